"""skeleton"""
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class VMTC:
    ratio: float = 0.5
    stages: int = 3
    cluster_share: float = 1 / 6
    merge: Literal["normalized", "raw"] = "normalized"
    order: Literal["spatial", "rank"] = "spatial"
    iterations: int = 10
