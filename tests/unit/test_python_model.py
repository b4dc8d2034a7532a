"""What a model.py may rely on: Triton's python_backend API and its meaning, without a process in between."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from gateway import errors
from gateway.engines.python import utilities
from gateway.engines.python.model import import_model
from gateway.types import DataType, InferResponse, RequestedOutput, Tensor
from tests.python_support import CONFIG, FakeChannel, ask, loaded, one, texts, write
from tests.support import request, tensor

DOUBLE = """
def execute(self, requests):
    return [
        pb_utils.InferenceResponse([pb_utils.Tensor("OUT", 2 * pb_utils.get_input_tensor_by_name(each, "IN").as_numpy())])
        for each in requests
    ]
"""
DECOUPLED = CONFIG + "model_transaction_policy { decoupled: true }"
STRINGS = """
backend: "python" max_batch_size: 8
input { name: "IN" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "OUT" data_type: TYPE_STRING dims: [ -1 ] }
"""


def answered(callee):
    """A model of the fake channel that gives what `callee` makes of the request."""

    def run(asked):
        yield InferResponse(asked.model_name, "1", callee(asked))

    return run


# --- a batch


def test_each_request_gets_the_rows_that_are_its_own(tmp_path):
    (model,) = loaded(tmp_path, DOUBLE)
    answers = one(model, request(1.0), request(2.0, rows=3), request(3.0))
    assert [each.outputs["OUT"].tolist() for each in answers] == [[[2, 2]], [[4, 4]] * 3, [[6, 6]]]


RAGGED = """
backend: "python" max_batch_size: 8
input { name: "TEXT" data_type: TYPE_STRING dims: [ -1 ] allow_ragged_batch: true }
input { name: "IN" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true optional: true }
output { name: "OUT" data_type: TYPE_STRING dims: [ -1 ] }
batch_input { target_name: "N" data_type: TYPE_FP32 source_input: "IN" }
"""
SHAPES = """
def execute(self, requests):
    told = [[f"{each.name()} {each.as_numpy().tolist()}" for each in request.inputs()] for request in requests]
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([each], dtype=object))]) for each in told]
"""


def test_requests_of_different_shapes_share_a_batch(tmp_path):
    (model,) = loaded(tmp_path, SHAPES, RAGGED)
    given = [
        {"TEXT": texts([b"a"]), "IN": tensor(np.arange(6).reshape(1, 2, 3))},
        {"TEXT": texts([b"b", b"c", b"d", b"e"], (2, 2)), "IN": tensor(np.zeros((2, 0, 1)))},
        {"TEXT": texts([]), "IN": tensor(np.full((1, 1, 1), 9))},
    ]
    answers = one(model, *(request(inputs=inputs, rows=inputs["TEXT"].shape[0]) for inputs in given))
    assert [sorted(each.outputs["OUT"].reshape(-1).tolist()) for each in answers] == [
        [b"IN [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]", b"TEXT [[b'a']]"],
        [b"IN [[], []]", b"TEXT [[b'b', b'c'], [b'd', b'e']]"],
        [b"IN [[[9.0]]]", b"TEXT [[]]"],
    ]


def test_a_ragged_input_may_be_absent(tmp_path):
    (model,) = loaded(tmp_path, SHAPES, RAGGED)
    (answer,) = one(model, request(inputs={"TEXT": texts([b"a"])}))
    assert answer.outputs["OUT"].tolist() == [[b"TEXT [[b'a']]"]]


def test_what_a_request_says_reaches_the_code(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            each, = requests
            said = [each.request_id(), each.correlation_id(), each.requested_output_names(), each.parameters(),
                    each.timeout(), each.flags(), each.is_cancelled(), each.trace().get_context(),
                    [t.name() for t in each.inputs()], each.inputs()[0].shape(), each.inputs()[0].is_cpu()]
            import json
            raise pb_utils.TritonModelException(json.dumps(said))
        """,
        channel=FakeChannel(),
    )
    parameters = {"key": 1, "timeout": 5, "sequence_id": "s", "sequence_start": True, "priority": 3}
    with pytest.raises(errors.Internal, match="Failed to process the request") as raised:
        one(model, request(id="a", parameters=parameters, outputs=("OUT",)))
    said = json.loads(raised.value.message.partition("TritonModelException: ")[2])
    assert said == ["a", "s", ["OUT"], '{"key": 1}', 5, 1, False, None, ["IN"], [1, 2], True]


def test_the_code_is_told_who_it_is_and_can_import_what_lies_beside_it(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "beside_the_model.py").write_text("A = 1")
    first, second = loaded(
        tmp_path,
        """
        def initialize(self, args):
            import beside_the_model
            self.args = args | {"dir": pb_utils.get_model_dir(), "A": beside_the_model.A}
        def execute(self, requests): pass
        """,
        count=2,
    )
    args = first._model.args
    version = args["model_version"]
    assert json.loads(args.pop("model_config"))["max_batch_size"] == 8
    assert args == {
        "model_instance_kind": "CPU", "model_instance_name": "m_0_0", "model_instance_device_id": "0", "A": 1,
        "model_repository": str(tmp_path / "m"), "model_version": version, "model_name": "m",
        "dir": str(tmp_path / "m" / version),
    }  # fmt: skip
    assert second._model.args["model_instance_name"] == "m_0_1"
    assert not list(tmp_path.rglob("__pycache__"))


def test_code_of_equal_names_is_told_apart(tmp_path):
    utilities.install("m", tmp_path, FakeChannel().infer, FakeChannel().measure)
    for name in ("a", "b"):
        path = write(tmp_path / name, "from .beside import NAME\ndef execute(self, requests): pass")
        (path / "beside.py").write_text(f"NAME = {name!r}")
        assert name == import_model(path, "model.py").NAME


def test_strings_are_bytes_both_ways(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            array = requests[0].inputs()[0].as_numpy()
            assert array.dtype == object and all(type(each) is bytes for each in array.flat)
            out = {b"object": np.array([[b"a\\0", "\u00e9", 3]], dtype=object), b"bytes": np.array([[b"ab", b"c"]]), b"": array}
            return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out[array.flat[0]])])]
        """,
        STRINGS,
    )

    def out(*values):
        (answer,) = one(model, request(inputs={"IN": texts(values)}))
        return answer.outputs["OUT"].tolist()

    assert out(b"object") == [[b"a\0", "é".encode(), b"3"]]
    assert out(b"bytes") == [[b"ab", b"c"]]
    assert out(b"", b"x\0") == [[b"", b"x\0"]]


def test_a_model_without_batches_gets_the_arrays_as_they_are(tmp_path):
    (model,) = loaded(tmp_path, DOUBLE, CONFIG.replace("max_batch_size: 8", ""))
    (answer,) = one(model, request(inputs={"IN": tensor([1, 2])}))
    assert answer.outputs["OUT"].tolist() == [2, 4]


def test_only_the_outputs_that_were_asked_for_are_sent(tmp_path):
    config = CONFIG + 'output { name: "MORE" data_type: TYPE_INT64 dims: [ 1 ] }'
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            outputs = [pb_utils.Tensor("OUT", np.ones((1, 2), np.float32)), pb_utils.Tensor("MORE", np.ones((1, 1), int)),
                       pb_utils.Tensor("UNKNOWN", np.ones(1))]
            return [pb_utils.InferenceResponse(outputs, parameters={"spent": 7}) for _ in requests]
        """,
        config,
    )
    everything, some = one(model, request(), request(outputs=("MORE",)))
    assert everything.outputs.keys() == {"OUT", "MORE"}
    assert some.outputs.keys() == {"MORE"}
    assert everything.parameters == {"spent": 7}


def test_coroutines_run_to_their_end(tmp_path):
    body = DOUBLE.replace("def execute", "async def execute").replace(
        "return [", "import asyncio; await asyncio.sleep(0)\n    return ["
    )
    (model,) = loaded(tmp_path, body)
    (answer,) = one(model, request(4.0))
    assert answer.outputs["OUT"].tolist() == [[8, 8]]


# --- failures


def test_an_error_is_answered_to_its_own_request(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError("no such page", pb_utils.TritonError.NOT_FOUND))
                    if each.request_id() == "bad" else pb_utils.InferenceResponse(each.inputs()) for each in requests]
        """,
        CONFIG.replace('"OUT"', '"IN"'),
    )
    good, bad = one(model, request(1.0), request(id="bad"))
    assert good.outputs["IN"].tolist() == [[1, 1]]
    assert type(bad.error) is errors.NotFound
    assert bad.error.message == "no such page"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNKNOWN", errors.GatewayError), ("INTERNAL", errors.Internal), ("INVALID_ARG", errors.InvalidArgument),
        ("UNAVAILABLE", errors.Unavailable), ("UNSUPPORTED", errors.Unsupported),
        ("ALREADY_EXISTS", errors.AlreadyExists), ("CANCELLED", errors.Cancelled),
    ],
)  # fmt: skip
def test_every_code_has_its_error(tmp_path, code, kind):
    (model,) = loaded(
        tmp_path,
        f"""
        def execute(self, requests):
            error = pb_utils.TritonError("no", code=pb_utils.TritonError.{code})
            assert (error.message(), error.code()) == ("no", pb_utils.TritonError.{code})
            return [pb_utils.InferenceResponse(error=error)]
        """,
    )
    (answer,) = one(model, request())
    assert type(answer.error) is kind


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("[]", "'m_0_0', message: Number of InferenceResponse objects do not match the number of InferenceRequest objects. InferenceRequest(s) size is:2, and InferenceResponse(s) size is:0"),
        ("7", "message: Expected a list in the execute return, found type '<class 'int'>'."),
        ("[1, 2]", "message: Expected an 'InferenceResponse' object in the execute function return list, found type '<class 'int'>'."),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_no_batch_may_return_fails_all_of_it(tmp_path, returned, text):
    (model,) = loaded(tmp_path, f"def execute(self, requests): return {returned}")
    with pytest.raises(errors.Internal) as raised:
        one(model, request(), request())
    assert raised.value.message.startswith("Failed to process the request(s) for model instance 'm_0_0', message: ")
    assert text in raised.value.message


def test_a_request_without_a_response_hears_of_it_and_its_neighbour_gets_its_own(tmp_path):
    (model,) = loaded(
        tmp_path,
        "def execute(self, requests): return [None, pb_utils.InferenceResponse([pb_utils.Tensor('OUT', np.ones((1, 2), 'f4'))])]",
    )
    without, answered_ = one(model, request(), request())
    assert "without a final response" in without.error.message
    assert answered_.outputs["OUT"].tolist() == [[1, 1]]
    (model,) = loaded(tmp_path, "def execute(self, requests): pass")
    assert [type(each.error) for each in one(model, request(), request())] == [errors.Internal] * 2


def test_an_output_of_another_type_than_configured_is_an_error(tmp_path):
    (model,) = loaded(
        tmp_path,
        "def execute(self, requests): return [pb_utils.InferenceResponse([pb_utils.Tensor('OUT', np.ones((1, 2)))])]",
    )
    (answer,) = one(model, request())
    assert answer.error.message == "the model gave output 'OUT' as FP64, its configuration says FP32"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("def execute(self, requests) pass", "SyntaxError"),
        ("def initialize(self, args): raise ValueError('no weights')", "ValueError: no weights"),
        ("pass", "has no execute method"),
        ("class Model: pass", "has no class TritonPythonModel"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_model_that_does_not_load_says_why(tmp_path, body, text):
    with pytest.raises(errors.Unavailable, match=text):
        loaded(tmp_path, body)


def test_an_environment_of_its_own_is_refused_with_what_to_do(tmp_path):
    config = (
        CONFIG + 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/e.tar.gz" } }'
    )
    with pytest.raises(errors.Unsupported, match="Install its packages where the gateway is installed"):
        loaded(tmp_path, DOUBLE, config)


# --- decoupled


def test_a_decoupled_model_answers_as_often_as_it_likes(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            for each in requests:
                sender = each.get_response_sender()
                for n in range(int(each.inputs()[0].as_numpy()[0, 0])):
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.full((1, 2), n, np.float32))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        DECOUPLED,
    )
    none, three = ask(model, request(0.0), request(3.0))
    assert [(each.outputs, each.final) for each in none] == [(None, True)]
    assert [each.final for each in three] == [False, False, False, True]
    assert [each.outputs["OUT"][0, 0] for each in three[:3]] == [0, 1, 2]


def test_answers_leave_while_the_model_works_on_the_next(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        import threading
        go = threading.Event()
        def execute(self, requests):
            sender = requests[0].get_response_sender()
            response = pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.ones((1, 2), np.float32))])
            sender.send(response)
            self.go.wait()
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        DECOUPLED,
    )
    from gateway.scheduling.batch import stack
    from gateway.types import Batch

    asked = (request(),)
    answers = model.answer(stack(asked, model._config), Batch(1, dict, requests=asked))
    assert not next(answers)[0].final
    model._model.go.set()
    assert next(answers)[0].final
    assert next(answers, None) is None


def test_a_thread_of_the_model_may_answer_after_execute(tmp_path):
    body = """
    def execute(self, requests):
        import threading
        for each in requests:
            threading.Thread(target=self.later, args=(each.get_response_sender(), each)).start()
    def later(self, sender, each):
        sender.send(pb_utils.InferenceResponse(each.inputs()), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """
    config = CONFIG.replace('"OUT"', '"IN"')
    for text in (config + "model_transaction_policy { decoupled: true }", config):
        (model,) = loaded(tmp_path, body, text)
        answers = one(model, *[request(float(n)) for n in range(4)])
        assert [each.outputs["IN"][0, 0] for each in answers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sends", "text"),
    [
        ("sender.send(response, flags=FINAL); sender.send(response)", "Response sender has been closed."),
        ("sender.send(response, flags=4)", "Unsupported flag provided."),
        ("sender.send()", "must be provided when the response flags is set to zero."),
    ],
)
def test_a_sender_is_used_as_it_may_be(tmp_path, sends, text):
    (model,) = loaded(
        tmp_path,
        f"""
        def execute(self, requests):
            FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            sender = requests[0].get_response_sender()
            response = pb_utils.InferenceResponse([])
            try:
                {sends}
            except pb_utils.TritonModelException as problem:
                type(self).said = str(problem)
            if not sender.closed:
                sender.send(flags=FINAL)
        """,
        DECOUPLED,
    )
    ask(model, request())
    assert text in model._model.said


def test_a_model_that_is_not_decoupled_answers_once(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            sender = requests[0].get_response_sender()
            said = self.said = []
            response = pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.ones((1, 2), np.float32))])
            for call in (lambda: sender.send(flags=FINAL), lambda: sender.send(response, FINAL), lambda: sender.send(response)):
                try:
                    call()
                except pb_utils.TritonModelException as problem:
                    said.append(str(problem))
        """,
    )
    one(model, request())
    before, after = model._model.said
    assert "cannot send complete final before sending a response" in before
    assert "cannot send more than one response" in after


def test_a_request_that_the_model_lets_go_of_is_answered(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            requests[0].get_response_sender().send(pb_utils.InferenceResponse([]))
        """,
        DECOUPLED,
    )
    first, second = ask(model, request(), request())
    assert [each.final for each in first] == [False, True]
    assert "without a final response" in first[-1].error.message
    assert "without a final response" in second[0].error.message


def test_a_decoupled_model_that_raises_ends_what_is_not_ended(tmp_path):
    body = """
    def execute(self, requests):
        if requests[0].request_id() == "sends":
            requests[0].get_response_sender().send(pb_utils.InferenceResponse([]))
        raise ValueError("out of ideas")
    """
    (model,) = loaded(tmp_path, body, DECOUPLED)
    first, second = ask(model, request(id="sends"), request())
    assert [each.error and each.error.message.rpartition(": ")[2] for each in first] == [None, "out of ideas"]
    assert "out of ideas" in second[0].error.message
    with pytest.raises(errors.Internal, match="out of ideas"):
        ask(model, request(), request())


def test_a_decoupled_model_returns_nothing(tmp_path):
    (model,) = loaded(tmp_path, "def execute(self, requests): return [pb_utils.InferenceResponse([])]", DECOUPLED)
    with pytest.raises(errors.Internal, match="using the decoupled mode and the execute function must return None"):
        ask(model, request())


def test_after_an_error_its_request_hears_nothing_more(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            sender = requests[0].get_response_sender()
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("no")))
            sender.send(pb_utils.InferenceResponse([]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        DECOUPLED,
    )
    ((answer,),) = ask(model, request())
    assert answer.error.message == "no"
    assert answer.final


def test_a_run_that_is_interrupted_ends(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        import threading
        begun, go = threading.Event(), threading.Event()
        def execute(self, requests):
            self.begun.set()
            self.go.wait()
        """,
        DECOUPLED,
    )
    ended = []

    def run():
        try:
            ask(model, request())
        except errors.Unavailable as problem:
            ended.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    model._model.begun.wait()
    model.interrupt()
    thread.join()
    model._model.go.set()
    assert len(ended) == 1


def test_a_cancelled_request_can_be_seen(tmp_path):
    channel = FakeChannel()
    channel.gone.add("left")
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError("gone", pb_utils.TritonError.CANCELLED))
                    if each.is_cancelled() else pb_utils.InferenceResponse([]) for each in requests]
        """,
        channel=channel,
    )
    left, stays = one(model, request(id="left"), request(id="stays"))
    assert type(left.error) is errors.Cancelled
    assert stays.error is None


def test_finalize_is_called_and_may_fail(tmp_path):
    (model,) = loaded(tmp_path, DOUBLE + "\ndef finalize(self): type(self).ended = True; raise ValueError('late')\n")
    model.close()
    assert model._model.ended


# --- calls of other models


CALLS = """
def initialize(self, args):
    self.request = lambda **more: pb_utils.InferenceRequest(
        model_name="half", requested_output_names=["OUT"], inputs=[pb_utils.Tensor("IN", np.full((1, 2), 8, np.float32))], **more)
    try:
        self.request().exec()
    except pb_utils.TritonModelException as problem:
        self.early = str(problem)
"""
HALF = {"half": answered(lambda asked: {"OUT": tensor(asked.inputs["IN"].array / 2)})}


def test_a_model_calls_another(tmp_path):
    channel = FakeChannel(HALF)
    (model,) = loaded(
        tmp_path,
        CALLS
        + """
def execute(self, requests):
    response = self.request(request_id="r", model_version=3, timeout=2_000_000, parameters={"k": "v"}, correlation_id=5,
                            flags=pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
                            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)).exec()
    assert not response.has_error()
    return [pb_utils.InferenceResponse([pb_utils.get_output_tensor_by_name(response, "OUT")])]
""",
        channel=channel,
    )
    assert model._model.early == "BLS is supported only during the 'execute' function."
    before = time.monotonic()
    (answer,) = one(model, request())
    assert answer.outputs["OUT"].tolist() == [[4, 4]]
    (asked,) = channel.asked
    assert (asked.model_name, asked.model_version, asked.id) == ("half", "3", "r")
    assert asked.outputs == (RequestedOutput("OUT"),)
    assert asked.parameters == {"k": "v", "sequence_id": 5, "sequence_start": True}
    assert before + 2 < asked.deadline < time.monotonic() + 2


def test_calls_side_by_side(tmp_path):
    gate = threading.Barrier(3)

    def together(asked):
        gate.wait()
        return {"OUT": tensor(asked.inputs["IN"].array / 2)}

    (model,) = loaded(
        tmp_path,
        CALLS
        + """
async def execute(self, requests):
    import asyncio
    responses = await asyncio.gather(*[self.request().async_exec() for _ in range(3)])
    return [pb_utils.InferenceResponse(responses[0].output_tensors())]
""",
        channel=FakeChannel({"half": answered(together)}),
    )
    (answer,) = one(model, request())
    assert answer.outputs["OUT"].tolist() == [[4, 4]]


def test_a_failed_call_is_a_response(tmp_path):
    def refuse(asked):
        raise errors.NotFound("no such model")
        yield

    (model,) = loaded(
        tmp_path,
        CALLS
        + """
def execute(self, requests):
    response = self.request().exec()
    assert response.has_error() and response.error().code() == pb_utils.TritonError.NOT_FOUND
    last, = self.request().exec(decoupled=True)
    assert last.has_error()
    return [pb_utils.InferenceResponse(error=response.error())]
""",
        channel=FakeChannel({"half": refuse}),
    )
    (answer,) = one(model, request())
    assert type(answer.error) is errors.NotFound
    assert answer.error.message == "no such model"


def test_a_decoupled_model_is_called_for_all_its_responses(tmp_path):
    def three(asked):
        for n in range(3):
            yield InferResponse("half", "1", {"OUT": tensor([[n, n]])}, final=n == 2)

    (model,) = loaded(
        tmp_path,
        CALLS
        + """
def execute(self, requests):
    responses = self.request().exec(decoupled=True)
    self.seen = [float(each.output_tensors()[0].as_numpy()[0, 0]) for each in responses]
    self.again = len(list(responses))
    try:
        self.request().exec()
    except pb_utils.TritonModelException as problem:
        self.said = str(problem)
    return [pb_utils.InferenceResponse([])]
""",
        channel=FakeChannel({"half": three}),
    )
    one(model, request())
    assert model._model.seen == [0.0, 1.0, 2.0]
    assert model._model.again == 3
    assert "Please use 'decoupled=True' argument" in model._model.said


# --- tensors and the rest of the module


def test_tensors_share_memory_through_dlpack(tmp_path):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            array = np.arange(4, dtype=np.float32).reshape(2, 2)
            tensor = pb_utils.Tensor("T", array)
            back = pb_utils.Tensor.from_dlpack("BACK", tensor.to_dlpack())
            assert np.shares_memory(back.as_numpy(), array) and back.name() == "BACK"
            assert np.shares_memory(np.from_dlpack(tensor), array)
            assert pb_utils.Tensor.from_dlpack("A", array).shape() == [2, 2]
            pb_utils.Tensor.from_dlpack("R", requests[0].inputs()[0].to_dlpack())
            for wrong in (lambda: pb_utils.Tensor("S", np.array([b"a"], object)).to_dlpack(),
                          lambda: pb_utils.Tensor.from_dlpack("N", object()), lambda: pb_utils.Tensor("L", [1]),
                          lambda: pb_utils.Tensor("C", np.ones(1, complex))):
                try:
                    wrong()
                    raise ValueError("taken")
                except pb_utils.TritonModelException:
                    pass
            return [pb_utils.InferenceResponse([])]
        """,
    )
    assert one(model, request())[0].error is None


def test_names_of_types_are_tritons(tmp_path):
    (model,) = loaded(tmp_path, "pb = pb_utils\ndef execute(self, requests): pass")
    pb = model._model.pb
    assert pb.triton_string_to_numpy("TYPE_STRING") is np.object_
    assert pb.triton_string_to_numpy("TYPE_FP16") is np.float16
    assert pb.triton_string_to_numpy("TYPE_BOOL") is np.bool_
    assert [pb.triton_to_numpy_type(number) for number in (1, 11, 13)] == [np.bool_, np.float32, np.object_]
    assert [pb.numpy_to_triton_type(kind) for kind in (np.bool_, np.float32, np.bytes_)] == [1, 11, 13]
    assert pb.Tensor("T", np.ones(1, np.int64)).triton_dtype() == 9
    wire = pb.serialize_byte_tensor(np.array([b"ab", "c"], object))
    assert wire == b"\x02\0\0\0ab\x01\0\0\0c"
    assert pb.deserialize_bytes_tensor(wire).tolist() == [b"ab", b"c"]


def test_bf16_has_no_numpy_array(tmp_path):
    config = CONFIG.replace("TYPE_FP32", "TYPE_BF16")
    (model,) = loaded(
        tmp_path,
        "def execute(self, requests): return [pb_utils.InferenceResponse([pb_utils.Tensor('OUT', requests[0].inputs()[0].as_numpy())])]",
        config,
    )
    bits = Tensor.from_array(DataType.BF16, np.ones((1, 2), np.uint16))
    with pytest.raises(errors.Internal, match="bf16 and cannot be converted to numpy"):
        one(model, request(inputs={"IN": bits}))


def test_lines_of_the_model_are_in_the_log(tmp_path, caplog):
    (model,) = loaded(
        tmp_path,
        """
        def execute(self, requests):
            pb_utils.Logger.log_warn("look out")
            pb_utils.Logger.log("nothing", pb_utils.Logger.INFO)
            return [pb_utils.InferenceResponse([])]
        """,
    )
    caplog.set_level("INFO", "gateway")
    one(model, request())
    lines = [str(record.msg) for record in caplog.records]
    assert lines == ['model_log model=m message="look out"', "model_log model=m message=nothing"]
