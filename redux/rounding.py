"""Rounding of whole numbers up, for counts of groups and sizes of blocks.

Kernels use these functions on the host, to compute the sizes of their grids and blocks before each launch. Triton has
triton.cdiv and triton.next_power_of_2 for host and device, which take about 2 µs a call on the host. A layer makes up
to ten of these calls, so they took a tenth of its host time.
"""


def divide_up(number: int, divisor: int) -> int:
    """Divide and round up.

    >>> divide_up(128, 64), divide_up(129, 64)
    (2, 3)
    """
    return -(-number // divisor)


def round_up(number: int, step: int) -> int:
    """Round up to a multiple of a step.

    >>> round_up(128, 64), round_up(129, 64)
    (128, 192)
    """
    return divide_up(number, step) * step


def next_power_of_two(number: int) -> int:
    """Compute the smallest power of two that is at least the number.

    >>> next_power_of_two(1), next_power_of_two(96), next_power_of_two(128)
    (1, 128, 128)
    """
    return 1 << (number - 1).bit_length()
