"""The one place of the version: packaging reads it from here without importing anything."""

__version__ = "0.1.0"
