"""Random models, served by a real gateway and compared with ONNX Runtime in this process: `python -m loadtest.fuzz`.

`models.py` makes a model with its `config.pbtxt`, `operators.py` what it computes, `requests.py` good requests and what ONNX Runtime
answers, `malformed.py` bad ones and the error that is due, `wires.py` sends them, `session.py` plays them against a gateway, `report.py`
writes down what went wrong. Everything follows from a seed and the number of a model.
"""
