"""The package stands alone: no torch, no dptaft, and importing it imports nothing heavy."""

import subprocess
import sys
from pathlib import Path

import dptaft_accounting

ROOT = Path(dptaft_accounting.__file__).parents[1]

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
sys.modules["torch"] = None
sys.modules["dptaft"] = None
import dptaft_accounting as a
heavy = sorted({{"numpy", "scipy", "dp_accounting", "prv_accountant"}} & set(sys.modules))
assert not heavy, heavy
for name in a.__all__:
    getattr(a, name)
z = a.calibrate_noise_multiplier(lambda z: a.PoissonGaussian(z, 0.1, 10), a.Target(epsilon=1.0, delta=1e-5))
statement = a.PrivacyStatement.build(a.PoissonGaussian(z, 0.1, 10), delta=1e-5)
assert statement.recompute().holds
assert "torch" not in {{name for name, module in sys.modules.items() if module is not None}}
print("stands alone")
"""


def test_works_isolated_with_torch_blocked():
    code = SCRIPT.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.stdout.strip().endswith("stands alone"), done.stderr


def test_public_names_resolve_and_unknown_ones_do_not():
    assert set(dptaft_accounting.__all__) <= set(dir(dptaft_accounting))
    assert not hasattr(dptaft_accounting, "guess")
