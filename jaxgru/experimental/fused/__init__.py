"""The recurrence as one kernel for NVIDIA's Hopper GPUs."""
