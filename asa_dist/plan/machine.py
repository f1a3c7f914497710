"""Machines: data-sheet figures of nodes that are not here, and what no data sheet says as assumptions with a name.

``this`` machine is measured instead: ``calibration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ASSUMED = {
    "training_efficiency": 0.40,  # model FLOPs utilisation of the matrix products
    "prefill_efficiency": 0.40,
    "decode_bandwidth_share": 0.60,  # of the memory bandwidth while weights and cache are read
    "collective_bandwidth_share": 0.80,  # of the link that the ring's slowest hop has
    "copy_bandwidth_share": 0.80,  # of host link and memory
    "overlap": 0.80,  # share of compute under which ZeRO's collectives can hide
    "hop_seconds": 5e-6,  # α, of one hop of a ring
    "hf_layer_seconds": 8e-4,  # host time that engine hf spends on a layer of one decoded token
    "vllm_layer_seconds": 3e-5,  # the same of engine vllm, with graphs
    "reserved_bytes": 4e9,  # CUDA context, NCCL's buffers, the allocator's fragments
}


@dataclass(frozen=True)
class Machine:
    """One node. Bandwidths are of one direction.

    Attributes:
        peak_flops: of one device, dense, by dtype.
        device_bytes: memory of a device; of a CPU rank, its share of the host's.
        link_bytes_per_second: of one device inside its node.
        network_bytes_per_second: of the whole node to others.
        host_link_bytes_per_second: device ↔ host.
        assumptions: by name; ``ASSUMED`` says what each means.
        measured: figures that were measured here and not assumed.
        source: where the figures come from.
    """

    name: str
    num_devices: int
    has_gpus: bool
    peak_flops: Mapping[str, float]
    device_bytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    host_link_bytes_per_second: float
    host_bytes: float
    source: str
    assumptions: Mapping[str, float] = field(default_factory=lambda: dict(ASSUMED))
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_rehearsed(self) -> bool:
        """Whether the config that is planned has been tried here, with fewer layers: ``rehearsal``."""
        return "layer_compute_seconds" in self.measured

    def ring_bytes_per_second(self, num_nodes: int) -> float:
        """Of a ring over all ranks: inside one node by its links; else a node's network cards carry its share."""
        slowest = self.link_bytes_per_second
        if num_nodes > 1:
            slowest = min(slowest, self.network_bytes_per_second)
        return slowest * self.assumptions["collective_bandwidth_share"]


# Looked up: peaks (dense), memory, NVLink and PCIe (sheets give the sum of both directions) in NVIDIA's data sheets of
# A100 (nvidia-1758950-r4) and H100, as glennklockwood.com/garden/processors quotes them; network cards and host memory
# of an H100 node in docs.nvidia.com/dgx-basepod, "Core Components". Those of an A100 node were not found there.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "A100x8", 8, True, {"bfloat16": 312e12, "float32": 19.5e12}, 80e9, 2.039e12, 300e9, 8 * 25e9, 32e9, 2e12,
            "NVIDIA A100 80GB SXM data sheet (312 TFLOP/s bf16 dense, 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4); "
            "DGX A100 data sheet (8 x HDR 200 Gb/s, 2 TB)"),
        Machine(
            "H100x8", 8, True, {"bfloat16": 989e12, "float32": 67e12}, 80e9, 3.35e12, 450e9, 8 * 50e9, 64e9, 2e12,
            "NVIDIA H100 SXM data sheet (989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe 5); "
            "DGX H100 data sheet (8 x NDR 400 Gb/s, 2 TB)"),
    )
}  # fmt: skip
