"""What is fixed of the Hopper forward kernel and what may be varied. Imports no jax.

A config that asks for more registers than the launch reserved hangs the GPU: it is refused here, before anything is launched. What
fits shared memory depends on the call (`call_shape`).
"""

from dataclasses import dataclass

BLOCK_Q = 64  # query rows of a consumer warpgroup: one wgmma. 128 spill 948 bytes, and so do three consumers
CONSUMERS = 2  # warpgroups that compute; a third feeds them
BLOCK_ROWS = CONSUMERS * BLOCK_Q  # query rows of a thread block
BLOCK_KV = 128  # keys of a step. 256 spill
VALID_ROWS = 8  # rows of ones below V, whose product with P is the row sums; 8 is the granularity of wgmma's N

SHARED_MEMORY = 227 * 1024  # bytes that one thread block may have on sm_90
_REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor
_WARPGROUP = 128  # threads


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How `pallas_kernels.sm90.forward` uses a multiprocessor.

    Attributes:
      stages: key blocks in flight, 2, 4 or 8 (another number costs 23 instructions a step for the remainder).
      cluster: thread blocks that share their key blocks by multicast, 1 or 2.
      promote_every: steps of 128 keys, 1, 2, 4 or 8, whose FP8 products P V the tensor cores add up themselves, in fewer bits than
        float32 has, before the sum goes to float32 registers. More than 1 saves instructions and costs accuracy
        (docs/numerics.md), so the autotuner leaves it alone.
      persistent: launch as many thread blocks as run at a time, each for many blocks of query rows, whose copies then start during
        the block before. The blocks are dealt out in turn, whatever their counts.
      take_turns: a consumer issues the products of a step only after the other one has, so that one's softmax runs beside the
        other's products, not left to chance (FlashAttention-3's ping-pong, arXiv 2407.08608, section 3.1).
      polynomial_columns: of the 128 keys of a step, 0, 16, 32 or 48 whose FP8 exponentials are a polynomial (relative error 7.5e-5)
        on the multiply-adders, as the special-function unit is as busy as the tensor cores are (FlashAttention-4, arXiv
        2603.05451). 7 instructions an exponential.
      consumer_registers, producer_registers: of a thread after `setmaxnreg`. 232 and 40 spill 28 bytes with two stages.
    Raises: ValueError for a value outside these, or registers that sum to more than the launch has: that would hang the GPU.
    """

    stages: int = 4
    cluster: int = 1
    promote_every: int = 1
    persistent: bool = False
    take_turns: bool = False
    polynomial_columns: int = 0
    consumer_registers: int = 240
    producer_registers: int = 24

    def __post_init__(self):
        if self.stages not in (2, 4, 8):
            raise ValueError(f"stages={self.stages} is not 2, 4 or 8; use 4, or 2 where shared memory is short")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster={self.cluster} is not 1 or 2; use 1 where a tile is one block of {BLOCK_ROWS}")
        if self.promote_every not in (1, 2, 4, 8):
            raise ValueError(f"promote_every={self.promote_every} is not 1, 2, 4 or 8; use 1")
        if self.polynomial_columns not in (0, 16, 32, 48):
            raise ValueError(f"polynomial_columns={self.polynomial_columns} is not 0, 16, 32 or 48; use 0")
        for name in ("consumer_registers", "producer_registers"):
            value = getattr(self, name)
            if value % 8 or not 24 <= value <= 256:
                raise ValueError(f"{name}={value} is not a multiple of 8 from 24 to 256, as setmaxnreg wants it")
        launch = launch_registers()
        wanted = CONSUMERS * self.consumer_registers + self.producer_registers
        if wanted > launch * (CONSUMERS + 1):
            raise ValueError(
                f"consumer_registers={self.consumer_registers} twice and producer_registers={self.producer_registers} "
                f"are {wanted}, more than the {launch * (CONSUMERS + 1)} of the launch, and would hang the GPU; "
                "use 240 and 24"
            )


def launch_registers() -> int:
    """Registers a thread that a launch of all warpgroups reserves: 168."""
    return _REGISTER_FILE // (_WARPGROUP * (CONSUMERS + 1)) // 8 * 8


def scales_per_block(tokens_per_scale: int) -> int:
    """Scales that a block of 128 keys has: 1 where groups are whole blocks, else 2, one for each half."""
    return 1 if tokens_per_scale % BLOCK_KV == 0 else 2
