"""Sizes of grids and blocks, computed on the host before each launch.

triton.cdiv and triton.next_power_of_2 do the same for host and device, at about 2 µs a call on the host. A layer makes
up to ten of these calls, so they took a tenth of its host time.
"""


def divide_up(number: int, divisor: int) -> int:
    """Divide and round up.

    >>> divide_up(128, 64), divide_up(129, 64)
    (2, 3)
    """
    return -(-number // divisor)


def next_power_of_two(number: int) -> int:
    """Compute the smallest power of two that is at least the number.

    >>> next_power_of_two(1), next_power_of_two(96), next_power_of_two(128)
    (1, 128, 128)
    """
    return 1 << (number - 1).bit_length()
