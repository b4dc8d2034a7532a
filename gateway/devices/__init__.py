"""What this machine has to run models on, and how it fares: kinds of devices, GPUs by NVML, the CPU by /proc and /sys."""
