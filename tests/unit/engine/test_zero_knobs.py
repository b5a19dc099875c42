"""What a file of ZeRO's knobs may say, against the models of the installed DeepSpeed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_lpa.engine.ds_config import SHIPPED, read_zero_knobs
from megatron_lpa.engine.zero_knobs import OBJECTS, REFUSED, TOP, ZERO, Knob, check_device, check_world
from megatron_lpa.errors import UserError

OFFLOADS = {
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "offload_param": DeepSpeedZeroOffloadParamConfig,
}
MODELS = {**OFFLOADS, "leaf_module": DeepSpeedZeroLeafModuleConfig, "comms_logger": CommsLoggerConfig}


def read(folder: Path, zero: Any, **top: Any) -> dict[str, Any]:
    """The ``zero_optimization`` that is used for a file."""
    path = folder / "knobs.json"
    path.write_text(zero if isinstance(zero, str) else json.dumps({"zero_optimization": zero, **top}))
    found: dict[str, Any] = read_zero_knobs(str(path), "fp32")["zero_optimization"]
    return found


def refusal(folder: Path, zero: Any, **top: Any) -> str:
    """Why a file is refused, without its name, which every message begins with."""
    with pytest.raises(UserError) as caught:
        read(folder, zero, **top)
    assert caught.value.exit_code == 78
    message = str(caught.value)
    assert message.startswith(str(folder / "knobs.json")) and "\n" not in message
    return message.removeprefix(str(folder / "knobs.json"))


def of_deepspeed(field: FieldInfo) -> Knob:
    """A field of DeepSpeed's as we would describe it."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    kind = next((one for one in (bool, int, float, list) if one in kinds), str)
    low, high = -math.inf, math.inf
    for limit in field.metadata:
        low = limit.ge if isinstance(limit, Ge) else limit.gt + 1 if isinstance(limit, Gt) else low
        high = limit.le if isinstance(limit, Le) else high
    return Knob(kind, low, high, type(None) in get_args(field.annotation))


def names_of(model: Any) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def test_the_table_has_every_knob_of_deepspeeds():
    fields = names_of(DeepSpeedZeroConfig)
    assert {*ZERO, *OBJECTS, *REFUSED} == set(fields)
    ours = {name: knob for name, knob in ZERO.items() if name != "stage"}  # an enumeration there
    assert {name: of_deepspeed(fields[name]) for name in ours} == ours


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_of_objects_are_deepspeeds(name):
    fields, ours = names_of(MODELS[name]), OBJECTS.get(name) or TOP[name]
    assert set(ours) == set(fields)
    for key, knob in ours.items():
        expected = Knob(list) if "List[" in str(fields[key].annotation) else of_deepspeed(fields[key])
        assert knob == expected, key


def test_the_table_of_aio_is_deepspeeds():
    """Without what reads NVMe, for which DeepSpeed asserts a GPU."""
    expected = {key: type(value) for key, value in AIO_DEFAULT_DICT.items() if key != "use_gds"}
    assert {key: knob.kind for key, knob in TOP["aio"].items()} == expected


@pytest.mark.parametrize(
    "value", ["true", "auto", "big", [], {}, "x" * 5000, 10**400, 0.5, -(2**70)], ids=lambda v: str(v)[:5]
)
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path, value):
    for key in ZERO:
        message = refusal(tmp_path, {"stage": 1, key: value})
        assert f"zero_optimization.{key}" in message and ("must be " in message or "give " in message)
        assert len(message) < 300


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"offload_optimizer": True}, ["offload_optimizer is true", '{"device": "cpu"}']),
        ({"offload_optimizer": {"devise": "cpu"}}, ["offload_optimizer.devise", "did you mean 'device'"]),
        ({"offload_optimizer": {"device": "CPU"}}, ["offload_optimizer.device is 'CPU'", "'cpu' or 'none'"]),
        ({"offload_optimizer": {"device": None}}, ["offload_optimizer.device is null"]),
        ({"offload_optimizer": {"device": "cpu", "ratio": 2}}, ["offload_optimizer.ratio is 2",
        "from 0 to 1"]),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ["offload_optimizer.ratio needs",
        "stage 3"]),
        ({"offload_param": {"device": "cpu"}}, ["offload_param needs zero_optimization.stage 3"]),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, ["offload_param to nvme", "cpu"]),
        ({"cpu_offload": True}, ["cpu_offload is an old name", '"offload_optimizer": {"device": "cpu"}']),
        ({"zenflow": {}}, ["zenflow is not supported"]),
        ({"compute_grad_norm": False}, ["compute_grad_norm", "remove it"]),
        ({"overlap_com": True}, ["zero_optimization.overlap_com", "did you mean 'overlap_comm'"]),
        ({"device": "cpu"}, ["zero_optimization.device", "belongs in zero_optimization.offload_optimizer"]),
        ({"comms_logger": {}}, ["zero_optimization.comms_logger", "belongs in the file itself"]),
        ({"overlap_comm": 1}, ["overlap_comm is 1 but must be true or false"]),
        ({"reduce_bucket_size": True}, ["reduce_bucket_size is true", "whole number greater than 0"]),
        ({"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2},
        ["prefetch_bucket_size is given twice"]),
        ({"leaf_module": ["a.B"]}, ["leaf_module is ['a.B']", '"names"']),
        ({"leaf_module": {"names": [1]}}, ["leaf_module.names is [1]", "a list of texts"]),
        ({"reduce_bucket_size": 10**15}, ["reduce_bucket_size", "1,000,000,000,000 or less"]),
        ({"allgather_bucket_size": 101}, ["allgather_bucket_size is 101 but must be even"]),
        ({"module_granularity_threshold": 5}, ["module_granularity_threshold is not supported"]),
        ({"legacy_stage1": True}, ["legacy_stage1", "remove it"]),
        ({"stage": 4}, ["zero_optimization.stage"]),
        ({"stage": 3.0}, ["zero_optimization.stage"]),
    ],
)  # fmt: skip
def test_what_zero_does_not_take_is_refused_with_the_way_out(tmp_path, zero, words):
    message = refusal(tmp_path, {"stage": 1, **zero})
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ({"overlap_comm": True}, ["unknown key 'overlap_comm'", "belongs in zero_optimization"]),
        ({"offload_optimizer": {}}, ["unknown key 'offload_optimizer'", "belongs in zero_optimization"]),
        ({"comms_loger": {}}, ["did you mean 'comms_logger'"]),
        ({"comms_logger": {"enable": True}}, ["comms_logger.enable", "did you mean 'enabled'"]),
        ({"comms_logger": {"prof_ops": "all"}}, ["comms_logger.prof_ops is 'all'"]),
        ({"aio": {"block_size": "1M"}}, ["aio.block_size is '1M'"]),
        ({"memory_breakdown": 0}, ["memory_breakdown is 0 but must be true or false"]),
    ],
)
def test_what_the_file_itself_does_not_take(tmp_path, top, words):
    message = refusal(tmp_path, {"stage": 1}, **top)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', ["the key 'stage' appears twice"]),
        ('{"zero_optimization": {"stage": 1},\n "zero_optimization": {"stage": 3}}', ["appears twice"]),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": NaN}}', ["NaN is no number"]),
        (
            '{"zero_optimization":\n{"stage": 1, "overlap_comm": True}}',
            ["line 2", "not valid JSON", "'True}}'"],
        ),
        ('{"zero_optimization": {"stage": 1,}}', ["line 1", "not valid JSON"]),
        ('{"zero_optimization": {"stage": 1} // no', ["line 1", "not valid JSON", "'// no'"]),
    ],
)
def test_what_only_looks_like_json(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("size", "world_size", "tp_size", "message"),
    [
        (1, 4, 2, None), (2, 4, 1, None), (16, 4, 1, None), (0, 4, 1, None),
        (3, 4, 1, "zero_hpz_partition_size is 3 but must divide the 4 processes"),
        (2, 4, 2, "needs parallel.tensor_parallel_size=1"),
    ],
)  # fmt: skip
def test_groups_of_parameters_fit_the_processes(tmp_path, size, world_size, tp_size, message):
    zero = read(tmp_path, {"stage": 3, "zero_hpz_partition_size": size})
    if message is None:
        check_world(tmp_path, zero, world_size, tp_size)
        return
    with pytest.raises(UserError, match=message):
        check_world(tmp_path, zero, world_size, tp_size)


@pytest.mark.parametrize(
    "knobs",
    [
        {"zero_quantized_weights": True},
        {"zero_quantized_nontrainable_weights": True},
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        {"offload_optimizer": {"device": "cpu", "super_offload": True}},
    ],
)
def test_what_only_a_gpu_can_do(tmp_path, knobs):
    zero = read(tmp_path, {"stage": 3, **knobs})
    with pytest.raises(UserError, match="needs a GPU"):
        check_device(tmp_path, zero)
    check_device(tmp_path, read(tmp_path, {"stage": 3, "offload_optimizer": {"device": "cpu"}}))


@pytest.mark.parametrize("given", [None, {}, {"device": "none"}, {"pin_memory": True}])
def test_an_offload_to_nowhere_is_none(tmp_path, given):
    """DeepSpeed's device is none where the file names none; the optimizer is chosen by whether there is an
    offload."""
    assert read(tmp_path, {"stage": 3, "offload_optimizer": given, "offload_param": given}) == {"stage": 3}
    offload = {"device": "cpu", "pin_memory": True}
    assert read(tmp_path, {"stage": 3, "offload_optimizer": offload}) == {
        "stage": 3,
        "offload_optimizer": offload,
    }


def test_numbers_as_people_write_them(tmp_path):
    used = read(
        tmp_path, '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "max_live_parameters": 1e9}}'
    )
    assert used == {
        "stage": 3,
        "reduce_bucket_size": 500_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
    }
    assert type(used["reduce_bucket_size"]) is int


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_passes_is_what_deepspeed_takes(path):
    knobs = json.loads(path.read_text())
    assert read_zero_knobs(path.stem, "fp32") == knobs
    DeepSpeedZeroConfig(**knobs["zero_optimization"])


@pytest.mark.parametrize("name", OFFLOADS)
def test_devices_are_deepspeeds(name):
    for device in ("cpu", "none"):
        OFFLOADS[name](device=device)
    with pytest.raises(ValidationError):
        OFFLOADS[name](device="CPU")


def test_the_check_needs_neither_deepspeed_nor_torch(tmp_path):
    """A login node has to be able to refuse a file, and a start has to do so before seconds of imports."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        "from megatron_lpa.engine.ds_config import read_zero_knobs; print(read_zero_knobs('zero1', 'bf16'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "'stage': 1" in done.stdout, done.stderr
