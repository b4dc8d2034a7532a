"""Settings that all processes share."""

from gateway.service.registers import Registers


async def test_a_process_that_is_alone_forgets_what_was_taken_back() -> None:
    told: list[tuple[str, object]] = []
    registers = Registers()
    registers.on("region", lambda name, value: told.append((name, value)))
    for number in range(3):
        await registers.set(f"region::{number}", [number])
        await registers.set(f"region::{number}", None)
    assert told == [(f"region::{number}", value) for number in range(3) for value in ([number], None)]
    assert registers.answer("{}") == b"{}"
    await registers.set("region::0", [7])
    assert registers.get("region::0") == [7]
