"""Words of messages."""


def pluralize(count: int, noun: str, number_format: str = "") -> str:
    """Format a count and its noun, which takes an s in the plural.

    Args:
        count: the count.
        noun: the noun in the singular.
        number_format: format of the count, such as ",".

    >>> pluralize(1, "trial"), pluralize(2000, "trial", ",")
    ('1 trial', '2,000 trials')
    """
    return f"{count:{number_format}} {noun}{'' if count == 1 else 's'}"
