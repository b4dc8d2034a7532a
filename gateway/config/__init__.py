"""What the operator and the model's author decided: process settings and model configurations.

`settings` and `arguments` hold the process; `parse`, `hints`, `check`, `complete`, `build` and `fit` turn a
`config.pbtxt` into the plain values of `model`. The only package that reads the environment.
"""
