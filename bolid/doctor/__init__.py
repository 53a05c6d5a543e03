"""`bolid doctor`: what this machine, its libraries and a family's files can do."""

from __future__ import annotations

from bolid.doctor.command import Diagnosis, diagnose
from bolid.doctor.rows import Row

__all__ = ["Diagnosis", "Row", "diagnose"]
