"""Chooses the backend of each primitive: by preference, or by measuring on the device. Choices are kept in a file."""

from __future__ import annotations

from fused_resnet.planner.choice import Choice, label
from fused_resnet.planner.dispatch import cache_of, forget, listeners, plan, planned, run, run_whole
from fused_resnet.planner.measuring import milliseconds
from fused_resnet.planner.preference import pick, why
