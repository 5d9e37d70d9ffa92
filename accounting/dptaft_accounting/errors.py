"""Errors of the accounting package; every one is a `ValueError` with a single line for the user."""

from __future__ import annotations


class AccountingError(ValueError):
    """A claim cannot be made; the message names the value at fault and the remedy."""


class MechanismError(AccountingError):
    """A mechanism record is malformed or describes an unsound combination."""


class CertificateError(AccountingError):
    """A convexity certificate cannot be issued, or does not belong to the mechanism at hand."""


class CalibrationError(AccountingError):
    """No value of the free parameter reaches the target."""


class StatementError(AccountingError):
    """A privacy statement violates its schema or does not follow from its own record."""


class AuditError(AccountingError):
    """An audit was asked for something that its statistics cannot give."""


class PolicyError(AccountingError):
    """A policy is malformed; the message names the rule."""
