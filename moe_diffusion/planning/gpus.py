"""What XLA's GPU compiler must know of a GPU that is not there."""

from __future__ import annotations

# kind -> name, bytes of memory, bytes per second. Both are Hopper chips that differ in nothing
# else (NVIDIA's data sheets of the SXM modules; the memory is what the driver reports).
_HOPPER = {
    "h100": ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": ("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000),
}


def memory_bytes(kind: str) -> int:
    """Bytes of memory of an "h100" or "h200"."""
    return _HOPPER[kind][1]


def target_config(kind: str) -> str:
    """XLA's `GpuTargetConfigProto` of a kind, as text."""
    name, memory, bandwidth = _HOPPER[kind]
    device = {
        "name": f'"{name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "cuda_compute_capability": "{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "device_memory_size": memory,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": 50 * 2**20,
        "shared_memory_per_core": 228 * 2**10,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": 227 * 2**10,
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
        # Of the toolkit and cuDNN that jax[cuda12] comes with, or older.
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
        f'platform_name: "CUDA"\ndevice_description_str: "{name}"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
    )
