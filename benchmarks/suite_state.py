"""The GPU suite's result, the time that is left, and what becomes of a part that fails or is cut short."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.kernel_timing import Setting, describe
from benchmarks.machine import versions_of, write_result
from benchmarks.step_timing import release
from benchmarks.suite_resume import FORMAT, code_digest, read_earlier

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy")


class OutOfTime(Exception):
    """A part that could not finish."""


class SuiteState:
    """The result so far and the time left.

    Args:
        setting: device, dtype, time per figure.
        output: where the result goes.
        total_s: limit on everything, from now on.
        earlier: a result whose figures are kept.
        aside: folder of logs and traces; the result's own without it.

    Raises:
        UserError: the earlier result cannot be gone on with.
    """

    def __init__(
        self,
        setting: Setting,
        output: Path,
        total_s: float,
        earlier: Path | None = None,
        aside: Path | None = None,
    ) -> None:
        self.setting, self.output, self.aside = setting, output, aside or output.parent
        self.start = time.monotonic()
        self.stop = self.deadline = self.start + total_s
        self.code = code_digest()
        head = {
            "benchmark": "gpu-suite",
            "format": FORMAT,
            **describe(setting),
            "versions": versions_of(PACKAGES),
        }
        before = {} if earlier is None else read_earlier(earlier, head)
        call = {"machine": head["machine"], "code": self.code, "limit_s": round(total_s, 1)}
        self.result: dict[str, Any] = {**before, **head, "calls": [*before.get("calls", []), call]}
        self.result["parts"] = copy.deepcopy(before.get("parts", {}))
        self.measured = False  # whether the current part has any new figure

    def left_s(self) -> float:
        """Until the current part has to end."""
        return self.stop - time.monotonic()

    def record(self, key: str, found: Any) -> None:
        """Puts new figures into the result, and writes it."""
        self.result[key] = found
        self.measured = True
        self.write()

    def write(self) -> None:
        write_result(self.output, self.result)

    def part(self, name: str, work: Callable[[], None], end_s: float) -> None:
        """Runs one part, and records its time, that it had none, that all was there already, or its error.

        Args:
            name: of the part.
            work: measures what is missing, by ``record``.
            end_s: when it has to end, from the suite's start.
        """
        begin = time.monotonic()
        before = self.result["parts"].get(name, {})
        self.stop = min(self.deadline, self.start + end_s)
        self.measured = False
        state: dict[str, Any] = {"status": "running", "code": before.get("code", [])}
        self.result["parts"][name] = state
        try:
            if self.left_s() <= 0:
                state["status"] = "no time left"
            else:
                self.write()
                work()
                state["status"] = "done" if self.left_s() > 0 else "stopped at the limit"
        except OutOfTime:
            state["status"] = "stopped at the limit"
        except ModuleNotFoundError as error:
            state |= {"status": "missing package", "package": error.name}
        except Exception as error:  # the parts that follow are worth having all the same
            state |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        except BaseException:  # a signal, which may be what the limit is kept by
            state["status"] = "interrupted" if self.left_s() > 0 else "stopped at the limit"
            self._finish(name, state, begin)
            raise
        if state["status"] == "done" and not self.measured and before.get("status") == "done":
            self.result["parts"][name] = before | {"kept": True}
            self.write()
            print(f"{name}: kept", flush=True)
            return
        release()
        self._finish(name, state, begin)

    def _finish(self, name: str, state: dict[str, Any], begin: float) -> None:
        if self.measured and self.code not in state["code"]:
            state["code"] = [*state["code"], self.code]
        state["seconds"] = round(time.monotonic() - begin, 1)
        self.write()
        print(f"{name}: {state['status']}, {state['seconds']} s", flush=True)
        if "error" in state:
            print(f"  {state['error'][:300]}", flush=True)

    def note(self, name: str, text: str) -> None:
        """Says in the result what a part left out, and why."""
        self.result["parts"][name]["note"] = text

    def failed_parts(self) -> list[str]:
        parts: Mapping[str, Any] = self.result["parts"]
        return [name for name, state in parts.items() if state["status"] == "failed"]
