"""A profiler's trace summed up, against small traces whose sums are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trace


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, correlation: int | None = None) -> Any:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_ldg8_f2f>",
            "matrix products",
        ),
        ("aten::mm", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("forward_kernel", "low-dimensional kernels"),
        ("input_gradient_kernel", "low-dimensional kernels"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<BFloat16>>", "elementwise"),
        ("triton_poi_fused_add_mul_0", "elementwise"),
    ],
)
def test_kernels_by_name(name: str, category: str) -> None:
    assert trace.category_of(name) == category


def test_self_times_leave_out_what_is_nested() -> None:
    operators = [
        event("cpu_op", "outer", 0, 100),
        event("cpu_op", "inner", 10, 30),
        event("cpu_op", "innermost", 15, 5),
        event("cpu_op", "second", 60, 40),
        event("cpu_op", "other thread", 20, 10, tid=2),
    ]
    assert trace.self_times(operators) == [30, 25, 5, 40, 10]
    assert trace.covered_us(operators) == 100
    assert trace.covered_us([event("kernel", "a", 0, 10), event("kernel", "b", 5, 10), event("kernel", "c", 20, 5)]) == 20  # fmt: skip  # noqa: E501


def test_a_step_on_a_gpu() -> None:
    events = [
        event("user_annotation", trace.STEP, 0, 100),
        event("user_annotation", "benchmark optimizer", 60, 40),
        *(event("user_annotation", "Optimizer.step#AdamW.step", 70 + 2 * number, 1) for number in range(5)),
        event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 3, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 90, 1, correlation=3),
        event("cuda_runtime", "cudaStreamSynchronize", 95, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 96, 1),
        event("cuda_runtime", "cudaDeviceSynchronize", 98, 1),
        event("cpu_op", "aten::_local_scalar_dense", 94, 6),
        event("kernel", "nvjet_tst", 10, 50, tid=7, correlation=1),
        event("kernel", "vectorized_elementwise_kernel", 70, 20, tid=7, correlation=2),
        # An ordinary kernel by name, launched by the optimizer: rounding the masters into the weights.
        event("kernel", "multi_tensor_apply_kernel", 100, 10, tid=7, correlation=3),
    ]
    figures = trace.summary(events)
    assert figures["on_gpu"] and figures["steps"] == 1
    assert figures["step_ms"] == pytest.approx(0.1)  # first to last kernel: 10 to 110
    assert figures["categories_ms"] == {
        "matrix products": 0.05, "elementwise": 0.02, "optimizer": 0.01
    }  # fmt: skip
    assert figures["idle_ms"] == pytest.approx(0.02)  # 60 to 70, 90 to 100
    assert figures["host_waits_per_step"] == {"stream": 1, "device": 2, "event": 0}
    assert figures["values_read_back_per_step"] == 1 and figures["attention_backend"] is None
    assert figures["launches_per_step"] == 3
    assert "matrix products" in trace.table(figures) and "1.0 (stream), 2.0 (device)" in trace.table(figures)


def test_work_of_zero_is_named_by_where_it_was_launched() -> None:
    """Also from the thread that autograd runs backward in, whose annotations are its own."""
    events = [
        event("user_annotation", trace.STEP, 0, 100),
        event("user_annotation", "benchmark parameter gather", 10, 10),
        event("user_annotation", "benchmark gradient reduction", 30, 20, tid=2),
        event("user_annotation", "benchmark optimizer", 60, 20),
        *(
            event("cuda_runtime", "cudaLaunchKernel", start, 1, tid, number)
            for number, (start, tid) in enumerate(((12, 1), (35, 2), (35, 1), (65, 1), (36, 2)))
        ),
        event("kernel", "copy_kernel", 15, 1, 7, correlation=0),
        event("kernel", "copy_kernel", 40, 2, 7, correlation=1),
        event("kernel", "copy_kernel", 45, 4, 7, correlation=2),
        event("kernel", "copy_kernel", 70, 8, 7, correlation=3),
        event("kernel", "ncclDevKernel_ReduceScatter", 80, 16, 8, correlation=4),
    ]
    assert trace.summary(events)["categories_ms"] == {
        "ZeRO-3 parameter gather": 0.001,
        "ZeRO-3 gradient reduction": 0.002,
        "elementwise": 0.004,
        "optimizer": 0.008,
        "communication": 0.016,
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "cuDNN"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "FlashAttention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "memory-efficient"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", None),
    ],
)
def test_attention_is_known_by_its_kernels(name: str, backend: str | None) -> None:
    assert trace.attention_backend(["aten::mm", name]) == backend


def test_steps_on_a_cpu_from_a_file(tmp_path: Path) -> None:
    events = [
        event("cpu_op", "aten::mm", -50, 10),  # before the first step
        event("user_annotation", trace.STEP, 0, 100),
        event("cpu_op", "aten::linear", 10, 50),
        event("cpu_op", "aten::mm", 20, 40),
        event("user_annotation", "Optimizer.step#AdamW.step", 70, 20),
        event("cpu_op", "aten::mul_", 75, 10),
        event("user_annotation", trace.STEP, 100, 100),
        {"ph": "M", "name": "process_name", "ts": 0},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    figures = trace.summary(trace.read_events(path))
    assert not figures["on_gpu"] and figures["steps"] == 2 and figures["step_ms"] == pytest.approx(0.1)
    assert figures["categories_ms"] == {"matrix products": 0.025, "optimizer": 0.005}
    assert figures["idle_ms"] == pytest.approx(0.07)
    assert figures["largest"][0] == {"name": "aten::mm", "ms_per_step": 0.02, "calls_per_step": 0.5, "category": "matrix products"}  # fmt: skip  # noqa: E501


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no annotation"):
        trace.summary([event("cpu_op", "aten::mm", 0, 1)])
