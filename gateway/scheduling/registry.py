"""The lanes and devices that a scheduler decides for: they open, close and are lost, and what is known of them can be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Generic

from gateway.scheduling.base import LaneKey, Limits, Place, QueuePolicy, W
from gateway.scheduling.lanes import Device, Lane, Seat, discount
from gateway.scheduling.latency import LatencyModel
from gateway.scheduling.report import LaneReport


class Registry(Generic[W]):
    """Lanes by key and devices by name. `cores` gives the slots of each device, 1 if it has none there."""

    def __init__(self, cores: Mapping[str, int]) -> None:
        self._cores = cores
        self._devices: dict[str, Device[W]] = {}
        self._lanes: dict[LaneKey, Lane[W]] = {}
        self._held: Mapping[str, Collection[Lane[W]]] = {}

    def open(self, lane: LaneKey, limits: Limits, places: Sequence[Place]) -> None:
        """A model version is ready to run. Opening a lane again replaces its limits and places and keeps its jobs."""
        state = self._lanes.get(lane)
        if state is None:
            state = self._lanes[lane] = Lane(lane, limits)
        state.limits = limits
        state.plain = limits.queue == QueuePolicy() and not limits.priority_queues
        state.seats = {}
        for place in places:
            device = self._device(place.device)
            seat = Seat(device, place, limits.max_rows)
            if place.device in state.past:
                seat.succeed(state.past[place.device])
            state.seats[place.device] = state.past[place.device] = seat
        self._attach(state)

    def close(self, lane: LaneKey) -> list[W]:
        """The version is gone: forget it and hand back the jobs that still wait."""
        state = self._lanes.pop(lane, None)
        if state is None:
            return []
        state.seats = {}
        self._attach(state)
        jobs = [entry.job for entry in state.entries() if entry.job is not None and not entry.done]
        for entry in list(state.entries()):
            discount(entry)
        return jobs + [job for job, _ in state.refused]

    def lost(self, device: str) -> None:
        """A device failed: its lanes are served by their other places until they are opened again."""
        for state in list(self._lanes.values()):
            if state.seats.pop(device, None) is not None:
                self._attach(state)

    def hold(self, lanes: Mapping[str, Sequence[LaneKey]]) -> None:
        """Start no runs of these lanes, by device, until the next call."""
        self._held = {device: [self._lanes[key] for key in keys] for device, keys in lanes.items()}

    def ready(self, lane: LaneKey, device: str) -> bool:
        """Whether something waits of a lane, and an instance on the device is idle and may have its cores."""
        state = self._lanes.get(lane)
        return state is not None and state.waiting > 0 and device in state.seats and state.seats[device].free

    def waits(self, lane: LaneKey) -> bool:
        """Whether jobs of the lane wait here."""
        state = self._lanes.get(lane)
        return state is not None and state.waiting > 0

    def is_quiet(self, lane: LaneKey) -> bool:
        """Whether no job of a lane waits or runs."""
        state = self._lanes.get(lane)
        if state is None:
            return True
        return not (state.running or state.refused or any(not entry.done for entry in state.entries()))

    def report(self, lane: LaneKey) -> LaneReport:
        """The counters of a lane. Raises KeyError for one that is not open."""
        return self._lanes[lane].report

    def latency(self, lane: LaneKey, device: str) -> LatencyModel:
        """What is known of the lane's runs on a device, lately. Raises KeyError for what is not open."""
        return self._lanes[lane].seats[device].current

    def seed(self, lane: LaneKey, device: str, prior: Mapping[str, float]) -> None:
        """Start from what `LatencyModel.to_prior` kept, where nothing is known yet. Raises KeyError or ValueError."""
        state = self._lanes[lane]
        seat = state.seats[device]
        if not seat.current.known:
            seat.current = LatencyModel.from_prior(seat.max_rows, prior)
            state.rank_places()

    def warmed(self, lane: LaneKey, device: str, rows: int, seconds: float, cores: int | None = None) -> None:
        """Learn from a run outside of service. Raises KeyError for a lane or device that is not open."""
        state = self._lanes[lane]
        state.seats[device].warmed(rows, seconds, cores)
        state.rank_places()

    def measured(self, lane: LaneKey, device: str, rows: int, seconds: float) -> None:
        """Take this for what a batch takes, whatever was known of its size. Raises KeyError as `warmed` does."""
        state = self._lanes[lane]
        state.seats[device].current.measured(rows, seconds)
        state.rank_places()

    def _device(self, name: str) -> Device[W]:
        device = self._devices.get(name)
        if device is None:
            device = self._devices[name] = Device(name, max(1, self._cores.get(name, 1)))
        return device

    def _attach(self, lane: Lane[W]) -> None:
        """Make the devices know which lanes they serve."""
        for device in self._devices.values():
            here = device.name in lane.seats
            if lane in device.lanes and not here:
                device.lanes.remove(lane)
            elif here and lane not in device.lanes:
                device.lanes.append(lane)
            for active in device.active:
                if here and active.run.lane == lane.key:
                    active.seat = lane.seats[device.name]
        lane.rank_places()
