"""skeleton"""
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class CMAI:
    maximum: float = 0.6
