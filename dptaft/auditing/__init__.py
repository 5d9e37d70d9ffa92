"""Empirical audits: canaries through the run's own training, scores out, a lower bound and a verdict.

canaries.py     what is inserted, and which code each kind exercises
engine.py       the run's engine with canary slots behind the records; what an observer sees
recipe.py       a finished run turned back into its recipe
repeat.py       the recipe repeated with secret coins
sensitivity.py  the deterministic check: neighbouring batches, noise off
noise_check.py, sampling_check.py  whether noise and batches are what the claim needs
membership.py   likelihood-ratio attacks on the released model, against its trade-off curve
report.py       one audit: tests, checks, verdict
"""
