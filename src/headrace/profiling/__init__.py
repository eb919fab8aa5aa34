"""What a step costs on this machine: measured once, fitted, kept on disk, corrected while it is used.

Torch-free: whatever is timed comes in as a callable.
"""

from headrace.profiling.fit import StepCost, fit
from headrace.profiling.measure import measure
from headrace.profiling.profile import MeasuredProfile, Point

__all__ = ["MeasuredProfile", "Point", "StepCost", "fit", "measure"]
