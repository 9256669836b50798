"""Read what was typed after an option into what the export side works with; raise ConfigError in the option's words."""

from pathlib import Path

from trtower.errors import ConfigError
from trtower.extras import import_extra
from trtower.spec import BatchProfile


def check_png(path: Path, option: str) -> None:
    """Raise ConfigError unless ``path`` is that of a PNG that can be written, MissingExtraError if nothing draws it."""
    if path.is_dir() or not path.parent.is_dir() or path.suffix.lower() != ".png":
        raise ConfigError(f"{path} cannot be written: a .png in a folder that exists is expected of {option}.")
    import_extra("matplotlib", extra="report", purpose=option)


def read_numbers(text: str) -> list[int]:
    """Read numbers that are separated by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"--batch {text}: whole numbers separated by commas are expected, such as 1,8,32.") from err


def read_profile(text: str) -> BatchProfile:
    """Read MIN,OPT,MAX, or one number N, which is 1,N,N."""
    numbers = read_numbers(text)
    if len(numbers) == 1:
        numbers = [1, *numbers * 2]
    if len(numbers) != 3:
        raise ConfigError(
            f"--batch {text}: MIN,OPT,MAX are expected, such as 1,8,32, or one number, the most; repeat --batch for "
            "several profiles."
        )
    return BatchProfile(min=numbers[0], opt=numbers[1], max=numbers[2])


def read_names(text: str) -> tuple[str, ...]:
    """Read names that are separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
