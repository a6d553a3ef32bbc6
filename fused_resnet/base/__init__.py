"""What the package rests on, itself resting on torch alone: arguments as callers give them, and locks."""
