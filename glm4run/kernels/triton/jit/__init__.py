"""The kernels themselves: functions in Triton's language, without launchers. Imported only where Triton is there."""
