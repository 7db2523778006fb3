"""How eval.py writes: it overwrites nothing that it has not written itself, and leaves nothing half there, whenever it is
killed and whatever the machine runs out of."""
import contextlib
import glob
import itertools
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from data.files import UserError, claim, is_out_of_memory, read_json, unwritable, wait_for_disk, write_json


# -------------------------------------------------------------------------------------------- sets of files

@contextlib.contextmanager
def claimed(directory: Path, names: tuple[str, ...] = ()):
    """Nobody else writes into a directory meanwhile. names: the files that are going to be written there; what a killed
    process left of one, half written, goes."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        claim(handle, directory)
        for name in names:
            if (directory / name).exists() and not (directory / name).is_file():
                raise UserError(f"{directory / name}: expected a file there, or nothing; choose another --out")
            for half in directory.glob(f".{name}.*.tmp"):
                half.unlink()
        yield
    finally:
        os.close(handle)


def set_aside(directory: Path, names: tuple[str, ...], what: str) -> None:
    """Renames those of a set of files that are there: NAME.json to NAME-1.json, or the next number that is free for all
    of them, and tells it. The first name goes first, so that after a kill the others can follow it to its number."""
    def aside(name: str, number: int) -> Path:
        return directory / f"{Path(name).stem}-{number}{Path(name).suffix}"

    def taken(number: int) -> list[str]:
        return [name for name in names if aside(name, number).exists()]

    there = [name for name in names if (directory / name).exists()]
    number = next(number for number in itertools.count(1) if not taken(number))
    gone = taken(number - 1)
    if names[0] in gone and names[0] not in there and not set(gone) & set(there):
        number -= 1
    for name in there:
        (directory / name).rename(aside(name, number))
    wait_for_disk(directory)
    print(f"{directory} held {what}, now in {' and '.join(str(aside(name, number)) for name in there)}")


def read_ours(file: Path, keys: set[str]) -> dict | None:
    """The fields of a JSON file that eval.py wrote, which has at least these keys; None for any other or no file."""
    try:
        found = read_json(file)
    except UserError:
        return None
    return found if keys <= found.keys() else None


@contextlib.contextmanager
def renewed(out: Path, names: list[str], about: dict, same: tuple[str, ...]):
    """Around the writing of pictures and pages, which names[0] describes: it gets `about` and is written first, so that
    the others are known as ours. An earlier set where the fields `same` are the same is replaced; all else that has
    one of these names is moved aside."""
    about = about | {"files": names}
    with claimed(out, names):
        old = read_ours(out / names[0], about.keys())
        is_same = old is not None and all(old[name] == about[name] for name in same) and isinstance(old["files"], list)
        foreign = [name for name in names if not (is_same and name in old["files"]) and (out / name).exists()]
        if foreign:
            set_aside(out, [name for name in names if name in foreign], "files of something else")
        write_json(out / names[0], about)
        for name in names[1:]:  # should a kill come before they are new, old ones must not stand beside the new page
            (out / name).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def written_whole(directory: Path):
    """Yields a new directory that becomes `directory`, which is empty or not there, when the block ends: nobody ever
    finds half of one. What a killed process left of it goes."""
    directory = directory.resolve()
    for half in directory.parent.glob(f".{glob.escape(directory.name)}.[0-9]*.tmp/"):
        with claimed(half):
            shutil.rmtree(half)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        with claimed(temporary):
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                wait_for_disk(path)
            temporary.replace(directory)
        wait_for_disk(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_problem(directory: Path) -> str | None:
    """Why `written_whole` cannot write a directory; None if it can."""
    if os.path.ismount(directory) or directory.resolve() == Path.cwd():
        return f"{directory}: cannot be replaced as a whole; expected a new directory, such as {directory / 'model'}"
    return unwritable(directory, empty=True) or unwritable(directory.resolve().parent)


@contextlib.contextmanager
def faults_told(c):
    """Around all that eval.py does: a fault of the machine becomes a UserError that says what to do. c: its flags."""
    scoring = not (c.export or c.prompt or c.gates or c.compare)
    kept = "; what was scored before is kept, and the same command goes on from there" if scoring else ""
    try:
        yield
    except BrokenPipeError:  # of whoever reads what is printed
        raise
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        text = str(error)
        if is_out_of_memory(error):
            raise UserError("out of memory: use --dtype bfloat16, a smaller --max-len or fewer --beams, each of which is "
                            f"another evaluation, or a larger machine{kept}") from error
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        named = isinstance(error, OSError) and error.filename
        where = c.export[-1] if c.export else c.out or c.run or "out"
        raise UserError((text if named else f"cannot write to {where}: {text}") + kept) from error
