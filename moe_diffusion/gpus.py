"""Descriptions of GPUs, with which XLA's compiler compiles for a GPU that is not there."""

from __future__ import annotations

from typing import NamedTuple


class _GPU(NamedTuple):
    """One kind of GPU, by NVIDIA's data sheets of the SXM modules.

    Attributes:
      memory: bytes, as the driver reports them.
      bandwidth: bytes per second.
      capability: the compute capability, as text of the proto.
      fpus: f32 units in each core.
      clock: GHz.
      l2: bytes.
      shared: KiB of shared memory in each core; a block of threads can have one KiB less.
    """

    name: str
    memory: int
    bandwidth: int
    capability: str
    cores: int
    fpus: int
    clock: float
    l2: int
    shared: int


_AMPERE = ("{ major: 8 minor: 0 }", 108, 64, 1.41, 40 * 2**20, 164)
_SM90A = "{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
_HOPPER = (_SM90A, 132, 128, 1.98, 50 * 2**20, 228)
_GPUS = {
    "a100": _GPU("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, *_AMPERE),
    "h100": _GPU("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, *_HOPPER),
    "h200": _GPU("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000, *_HOPPER),
}


def memory_bytes(kind: str) -> int:
    """Bytes of memory of an "a100" (of 80 GB), "h100" or "h200"."""
    return _GPUS[kind].memory


def target_config(kind: str) -> str:
    """XLA's `GpuTargetConfigProto` of an "a100", "h100" or "h200", as text."""
    gpu = _GPUS[kind]
    device = {
        "name": f'"{gpu.name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "cuda_compute_capability": gpu.capability,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2,
        "shared_memory_per_core": gpu.shared * 2**10,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": (gpu.shared - 1) * 2**10,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "threads_per_core_limit": 2048,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "device_address_bits": 64,
        # These versions are not newer than the toolkit and cuDNN that jax[cuda12] comes with.
        "driver_version": '"12.8.0"',
        "runtime_version": '"12.8.0"',
        "compile_time_toolkit_version": '"12.8.0"',
        "dnn_version": '"9.10.0"',
    }
    fields = "\n".join(
        f"  {key} {value}" if str(value).startswith("{") else f"  {key}: {value}"
        for key, value in device.items()
    )
    return (
        f"gpu_device_info {{\n{fields}\n}}\n"
        f'platform_name: "CUDA"\ndevice_description_str: "{gpu.name}"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
    )
