"""What this machine has to run models on, and how it fares.

| `kind`      | which devices give the same answers in the same time                          |
| `nvml`      | the GPUs of this process, by NVIDIA's management library, and what they report |
| `health`    | whether a GPU may be relied on, from what it reports                           |
| `monitor`   | reads the GPUs at an interval, off the event loop                              |
| `cpu`       | the processors, the control groups and the energy, by /proc and /sys          |
| `fake_nvml` | the management library without GPUs, for tests                                |

Nothing here needs a GPU, a driver or a package: what is not there is not reported.
"""
