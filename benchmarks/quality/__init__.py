"""Whether calibration helps, measured on tasks that are trained here (PROTOCOL.md)."""
