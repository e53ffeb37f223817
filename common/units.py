"""Times and sizes in the units in which people read them."""


def duration(seconds: float) -> str:
    """A time in its one or two largest units: "45 s", "12 min", "5 h 12 min", "3 d 4 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def size_text(count: int | float) -> str:
    """A number of bytes: "19.5 GiB", "3.2 MiB", "1.5 KiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
