"""Jobs of the application's main module (point 2): where it is found, when it is run, what is said where it can't be.

Each test writes a program and runs it. What the module level of a program does is noted in a file, a line for each
process that did it: so a test can tell who ran it, under which name, and that nobody else did.
"""

import json
import py_compile
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

from tests.python_child_jobs import Finished, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

HEAD: Final = """\
import functools, json, os, pickle, subprocess, sys
import trio
from trio_workers import JobError, open_python_pool

with open(os.environ["NOTES"], "a+") as file:
    print(os.getpid(), __name__, file=file, flush=True)
    file.seek(0)
    if len(file.readlines()) > 9:
        os._exit(9)  # a chain of spawns ends here, and not with the memory of the machine

"""

# A program whose jobs are its own.
PROGRAM: Final = (
    HEAD
    + """\
class Point:
    class Inner:
        pass

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is Point and type(self) is Point and self.x == other.x

    def moved(self, by=1):
        return Point(self.x + by)

    @classmethod
    def origin(cls):
        return cls(0)

class Broken(Exception):
    def __init__(self, point):
        super().__init__(point)
        self.point = point

def move(point, by=1):
    assert type(point) is Point
    return point.moved(by)

def call(function, *arguments):
    return function(*arguments)

def fail(point):
    raise Broken(point)

def points(count):
    yield from map(Point, range(count))

state = "as imported"

def about():
    return {
        "name": __name__,
        "main": sys.modules["__main__"].__dict__ is globals(),
        "package": __package__ or "",
        "file": os.path.abspath(__file__),
        "spec": __spec__ and __spec__.name,
        "argv": sys.argv,
        "state": state,
        "own": Point.__module__,
        "helped": helper.helped(2),
    }

async def main():
    global state
    state = "changed later"
    async with open_python_pool(1) as pool:
        pid = await pool.run_sync(os.getpid)
        assert await pool.run_sync(move, Point(1)) == Point(2)
        assert await pool.run_sync(Point(3).moved, 4) == Point(7)
        assert await pool.run_sync(Point.origin) == Point(0)
        assert await pool.run_sync(Point, 5) == Point(5)
        assert type(await pool.run_sync(Point.Inner)) is Point.Inner
        assert await pool.run_sync(functools.partial(move, by=5), Point(0)) == Point(5)
        assert await pool.run_sync(call, move, Point(1)) == Point(2)
        assert await pool.run_sync(call, type, Point(1)) is Point
        assert await pool.run_sync(dict, [(1, [Point(1)])]) == {1: [Point(1)]}
        assert await pool.run_sync(getattr, sys.modules["__main__"].Point(1), "x") == 1
        try:
            await pool.run_sync(fail, Point(1))
        except Broken as error:
            assert type(error) is Broken
            assert error.point == Point(1)
            assert ", in fail" in str(error.__cause__)
        else:
            raise AssertionError
        async with pool.stream(points, 3) as parts:
            assert [part async for part in parts] == [Point(0), Point(1), Point(2)]
        async with pool.map(move, map(Point, range(3))) as parts:
            assert [part async for part in parts] == [Point(1), Point(2), Point(3)]
        there = await pool.run_sync(about)
        assert pool.statistics().starts == 1
    print(json.dumps({"pid": pid, "here": about(), "there": there}))

if "GO_TO" in os.environ and __name__ == "__main__":
    os.chdir(os.environ["GO_TO"])

if __name__ == "__main__":
    trio.run(main)
"""
)

HELPER: Final = """\
def helped(number):
    return 2 * number
"""

WAYS: Final = ("script", "no suffix", "compiled", "-m module", "-m package", "-m package.module", "directory", "zip")


def write(way: str, where: Path, program: str = PROGRAM) -> list[str]:
    """Write a program so that it is started in one of the ways; return the arguments of the interpreter."""
    package = where / "package" if "package" in way else where
    if way == "directory":
        package = where / "application"
    package.mkdir(exist_ok=True)
    (package / "helper.py").write_text(HELPER)
    program = ("from . import helper\n" if "package" in way else "import helper\n") + program
    match way:
        case "script":
            # With what the file's own lines say of its encoding, and a name that is no module's.
            (where / "my program.py").write_bytes(f"# coding: latin-1\n# \xe4\n{program}".encode("latin-1"))
            return ["my program.py"]
        case "no suffix":
            (where / "program").write_text(program)
            return ["program"]
        case "compiled":
            (where / "source.py").write_text(program)
            py_compile.compile(str(where / "source.py"), str(where / "program.pyc"), doraise=True)
            (where / "source.py").unlink()
            return ["program.pyc"]
        case "-m module":
            (where / "program.py").write_text(program)
            return ["-m", "program"]
        case "-m package":
            (package / "__init__.py").touch()
            (package / "__main__.py").write_text(program)
            return ["-m", "package"]
        case "-m package.module":
            (package / "__init__.py").touch()
            (package / "program.py").write_text(program)
            return ["-m", "package.program"]
        case "directory":
            (package / "__main__.py").write_text(program)
            return ["application"]
        case _:
            with zipfile.ZipFile(where / "application.zip", "w") as file:
                file.writestr("__main__.py", program)
                file.writestr("helper.py", HELPER)
            (package / "helper.py").unlink()
            return ["application.zip"]


def run(
    arguments: list[str],
    where: Path,
    *,
    input: str = "",
    env: dict[str, str] | None = None,
    flags: tuple[str, ...] = (),
) -> Finished:
    """Run a program that was written to a directory, from there."""
    return run_program(
        [sys.executable, *flags, *arguments],
        cwd=where,
        env={"NOTES": str(where / "notes"), **(env or {})},
        input=input,
    )


def run_text(text: str, where: Path) -> Finished:
    """Run a script that has these lines after the usual ones."""
    (where / "program.py").write_text(HEAD + textwrap.dedent(text))
    return run(["program.py"], where)


def notes(where: Path) -> list[str]:
    """Return the names under which the program was run, the first of them the program itself."""
    return [line.split()[1] for line in (where / "notes").read_text().splitlines()]


def done(finished: Finished) -> str:
    """Return what a program printed that came to its end."""
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# where it is found


@pytest.mark.parametrize("way", WAYS)
def test_main_module_works_in_both_directions(way: str, tmp_path: Path) -> None:
    """Point 2: functions, classes and exceptions of it, however the program was started."""
    finished = run([*write(way, tmp_path), "--an", "argument"], tmp_path)
    found: dict[str, Any] = json.loads(done(finished))
    here, there = found["here"], found["there"]
    assert (here.pop("name"), there.pop("name")) == ("__main__", "__mp_main__")
    assert (here.pop("own"), there.pop("own")) == ("__main__", "__mp_main__")
    assert (here.pop("state"), there.pop("state")) == ("changed later", "as imported")
    assert there == here
    # Once by itself, and once by the worker, which needed it several times.
    assert notes(tmp_path) == ["__main__", "__mp_main__"]
    assert (tmp_path / "notes").read_text().splitlines()[1].split()[0] == str(found["pid"])
    assert not finished.stderr


@pytest.mark.parametrize("way", WAYS)
def test_main_module_is_found_from_elsewhere(way: str, tmp_path: Path) -> None:
    """Point 2: a program started by a relative name goes to another directory before it opens the pool."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    finished = run(write(way, tmp_path), tmp_path, env={"GO_TO": str(elsewhere)})
    done(finished)
    assert notes(tmp_path) == ["__main__", "__mp_main__"]


@pytest.mark.parametrize("way", ["script", "-m package.module"])
def test_main_module_that_a_tool_runs(way: str, tmp_path: Path) -> None:
    """Point 2: a program that another one runs in the place of its own main module, here for its coverage."""
    arguments = write(way, tmp_path)
    finished = run(["-m", "coverage", "run", f"--data-file={tmp_path / 'data'}", *arguments], tmp_path)
    assert "there" in json.loads(done(finished))
    assert notes(tmp_path) == ["__main__", "__mp_main__"]


def test_argument_or_result_alone_needs_the_main_module(tmp_path: Path) -> None:
    """Point 2: it is run for a class of it in an argument of somebody else's function, too, and once in each worker."""
    finished = run_text(
        """\
        class Point:
            def __len__(self):
                return 7

        async def main():
            async with open_python_pool(2) as pool:
                async with pool.lease() as one, pool.lease() as two:
                    for worker in (one, two):
                        for _ in range(2):
                            assert await worker.run_sync(len, Point()) == 7

        if __name__ == "__main__":
            trio.run(main)
        """,
        tmp_path,
    )
    done(finished)
    assert notes(tmp_path) == ["__main__", "__mp_main__", "__mp_main__"]


# never, where no job needs it


def test_main_module_is_not_run_for_other_jobs(tmp_path: Path) -> None:
    """Point 2: not for functions of other modules, their errors, a stream, an initializer, nor for who looks at it."""
    finished = run_text(
        """\
        import errno, json, math
        from tests import python_child_jobs as jobs

        def in_main():
            pass

        async def main():
            async with open_python_pool(1, initializer=json.loads, initargs=("[1]",)) as pool:
                assert await pool.run_sync(math.factorial, 5) == 120
                assert await pool.run_sync(json.loads, "{}") == {}
                try:
                    await pool.run_sync(json.loads, "{")
                except json.JSONDecodeError:
                    pass
                async with pool.stream(range, 3) as parts:
                    assert [part async for part in parts] == [0, 1, 2]
                async with pool.map(math.sqrt, [1, 4]) as parts:
                    assert [part async for part in parts] == [1, 2]
                # Libraries look at __main__ to learn where they are.
                assert await pool.run_sync(jobs.look_at, "hasattr(sys.modules['__main__'], '__file__')") is False
                assert await pool.run_sync(jobs.look_at, "str(__import__('inspect').getmodule(print))")
                await pool.run_sync(jobs.look_at, "__import__('warnings').warn('a warning')")
                assert await pool.run_sync(jobs.return_what_has_no_module) is jobs.NAMELESS
                assert await pool.run_sync(jobs.squares_in_executor, 2) == [0, 1]
                try:
                    await pool.run_sync(jobs.fork_and_return_what_has_no_pickle)
                except Exception as error:
                    print(error)

        if __name__ == "__main__":
            trio.run(main)
        """,
        tmp_path,
    )
    done(finished)
    assert notes(tmp_path) == ["__main__"]


def test_program_without_a_guard_may_have_jobs_of_other_modules(tmp_path: Path) -> None:
    """Point 2: a script without a guard, as one writes it to try something, works while its jobs are elsewhere."""
    finished = run_text(
        """\
        import math

        async def main():
            async with open_python_pool(2) as pool:
                async with pool.map(math.factorial, range(5)) as results:
                    print([result async for result in results])

        trio.run(main)
        """,
        tmp_path,
    )
    assert done(finished).strip() == "[1, 1, 2, 6, 24]"
    assert notes(tmp_path) == ["__main__"]


# where it can't be imported

UNGUARDED: Final = """\
def job():
    return os.getpid()

async def open_it():
    async with open_python_pool(2) as pool:
        async with pool.lease() as one, pool.lease() as two:
            for worker in (one, two):
                for _ in range(3):
                    try:
                        await worker.run_sync(job)
                    except JobError as error:
                        print(str(error).splitlines()[0])
                    else:
                        print("no error")
            # None of this cost the worker.
            assert [await worker.run_sync(os.getpid) for worker in (one, two)] == [one.pid, two.pid]
        assert pool.statistics().starts == 2

async def in_a_nursery():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_it)

async def raising_another():
    try:
        await open_it()
    except Exception:
        raise OSError("what the program makes of it")

"""


@pytest.mark.parametrize(
    "how",
    [
        "trio.run(open_it)",
        "trio.run(in_a_nursery)",
        "trio.run(raising_another)",
        "sys.exit(trio.run(open_it))",
        "try:\n    trio.run(open_it)\nexcept Exception as error:\n    sys.exit(f'failed: {error}')",
    ],
    ids=["plain", "nursery", "another error", "exit", "exit with a text"],
)
def test_missing_guard_is_said_and_starts_no_chain(how: str, tmp_path: Path) -> None:
    """Point 2: one clear sentence for each job, the module level run once in each worker, and no process from there."""
    finished = run_text(UNGUARDED + how, tmp_path)
    lines = done(finished).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.count('if __name__ == "__main__":') == 1
        assert line.count("cloudpickle") == 1
        assert "a module of their own" in line
        assert "Traceback" not in line
    assert notes(tmp_path) == ["__main__", "__mp_main__", "__mp_main__"]
    assert not finished.stderr.count("Traceback")


def test_missing_guard_around_other_processes_starts_no_chain(tmp_path: Path) -> None:
    """Point 2: nor where the pool opens in a program that the unguarded module starts, once, for itself."""
    finished = run_text(
        UNGUARDED
        + textwrap.dedent(
            """\
            if len(sys.argv) == 1:
                sys.exit(subprocess.run([sys.executable, __file__, "inner"]).returncode)
            trio.run(open_it)
            """
        ),
        tmp_path,
    )
    assert done(finished).count('if __name__ == "__main__":') == 6
    assert notes(tmp_path) == ["__main__", "__main__", "__mp_main__", "__mp_main__"]


def test_missing_guard_that_swallows_the_error(tmp_path: Path) -> None:
    """Point 2: a module that goes on after the error is imported as far as anyone can tell, and its jobs run."""
    finished = run_text(
        UNGUARDED + "try:\n    trio.run(open_it)\nexcept RuntimeError as error:\n    assert __name__ != '__main__'\n",
        tmp_path,
    )
    assert done(finished).splitlines() == ["no error"] * 6
    assert notes(tmp_path) == ["__main__", "__mp_main__", "__mp_main__"]


def test_missing_guard_and_an_initializer_of_main(tmp_path: Path) -> None:
    """Point 2: the pool does not open, with the same sentence."""
    finished = run_text(
        """\
        from trio_workers import SpawnError

        def begin():
            pass

        async def main():
            try:
                async with open_python_pool(2, initializer=begin):
                    raise AssertionError
            except SpawnError as error:
                print(f"{error} {error.__cause__!r}".replace("\\n", " "))

        trio.run(main)
        """,
        tmp_path,
    )
    assert 'if __name__ == "__main__":' in done(finished)
    assert len(notes(tmp_path)) <= 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("if __name__ != '__main__': sys.exit(3)", "SystemExit: 3"),
        ("if __name__ != '__main__': sys.exit()", "SystemExit"),
        ("if __name__ != '__main__': raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("if __name__ != '__main__': raise ValueError('its own')", "ValueError: its own"),
        ("if __name__ != '__main__': import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
    ids=["exit", "exit 0", "interrupt", "error", "import"],
)
def test_main_module_that_fails_is_a_sentence(lines: str, said: str, tmp_path: Path) -> None:
    """Point 2: what its import raises, `SystemExit` too, is an error of the job, said once, and costs no worker."""
    text = f"{UNGUARDED}\n{lines}\nif __name__ == '__main__':\n    trio.run(open_it)\n"
    finished = run_text(text, tmp_path)
    printed = done(finished).splitlines()
    assert len(printed) == 6
    for line in printed:
        assert said in line
        assert line.count("could not be imported in a worker") == 1
        assert "program.py" in line
    assert notes(tmp_path)[:1] == ["__main__"]
    assert len(notes(tmp_path)) <= 3


def test_main_module_whose_file_is_gone(tmp_path: Path) -> None:
    """Point 2: likewise where a worker finds no file any more."""
    text = UNGUARDED.replace("    async with pool.lease()", "    os.unlink(__file__)\n        async with pool.lease()")
    finished = run_text(text + "if __name__ == '__main__':\n    trio.run(open_it)\n", tmp_path)
    printed = done(finished).splitlines()
    assert len(printed) == 6
    for line in printed:
        assert "could not be imported in a worker: FileNotFoundError" in line
    assert notes(tmp_path) == ["__main__"]


def test_main_module_that_exits_at_its_end(tmp_path: Path) -> None:
    """Point 2: `sys.exit(trio.run(main))` behind the guard, as one writes it, is not reached by a worker."""
    finished = run_text(
        """\
        def job():
            return os.getpid()

        async def main():
            async with open_python_pool(1) as pool:
                assert await pool.run_sync(job) == pool.workers[0].pid
            return 0

        if __name__ == "__main__":
            sys.exit(trio.run(main))
        """,
        tmp_path,
    )
    done(finished)


def test_function_behind_the_guard_is_a_sentence(tmp_path: Path) -> None:
    """Point 2: what is defined behind the guard is not there in a worker; the error names it and the guard."""
    finished = run_text(
        """\
        async def main():
            async with open_python_pool(1) as pool:
                for argument in ((job,), (isinstance, 1, Kind), (len, Kind())):
                    try:
                        await pool.run_sync(*argument)
                    except JobError as error:
                        print(str(error).splitlines()[0])
                assert pool.statistics().starts == 1

        if __name__ == "__main__":
            def job():
                pass

            class Kind:
                pass

            trio.run(main)
        """,
        tmp_path,
    )
    lines = done(finished).splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ["job", "Kind", "Kind"], strict=True):
        assert f"'{name}'" in line
        assert 'if __name__ == "__main__":' in line
    assert notes(tmp_path) == ["__main__", "__mp_main__"]


# where it can't be found

NOWHERE: Final = """\
def job():
    pass

class Kind:
    pass

async def main():
    try:
        async with open_python_pool(1, initializer=job):
            pass
    except pickle.PicklingError as error:
        print(error)

    async with open_python_pool(1) as pool:
        for call in ((job,), (Kind,), (functools.partial(job),), (Kind().__repr__,), (len, Kind()), (repr, [job])):
            try:
                await pool.run_sync(*call)
            except (pickle.PicklingError, JobError) as error:
                print(str(error).splitlines()[0])
        assert await pool.run_sync(os.getpid) == pool.workers[0].pid
        assert pool.statistics().starts == 1

trio.run(main)
"""


@pytest.mark.parametrize("way", ["stdin", "-", "-c", "interactive"])
def test_main_module_from_nowhere_is_a_sentence(way: str, tmp_path: Path) -> None:
    """Point 2: from standard input, -c or a prompt, one clear sentence, whatever of the main module a job needs."""
    text = HEAD + NOWHERE
    arguments = {"stdin": [], "-": ["-"], "-c": ["-c", text], "interactive": ["-i", "-q"]}[way]
    if way == "interactive":
        # At a prompt a line of its own ends what is indented.
        text = f"exec({text!r})\n"
    finished = run(arguments, tmp_path, input="" if way == "-c" else text)
    lines = done(finished).splitlines()
    assert len(lines) == 7, finished
    for line in lines:
        assert "from standard input, from -c or from a notebook" in line
        assert "put the functions and classes of jobs in a module of their own" in line
        assert line.count("cloudpickle") == 2  # the option, and how to install it
    assert notes(tmp_path) == ["__main__"]


# pools within pools, and other processes


def test_nested_pool_in_a_job_of_main(tmp_path: Path) -> None:
    """Point 2: a job of the main module opens a pool of its own for jobs, arguments and results of the main module."""
    finished = run_text(
        """\
        class Point:
            def __init__(self, x):
                self.x = x

        class Broken(Exception):
            pass

        def move(point):
            assert type(point) is Point
            return Point(point.x + 1)

        def fail():
            raise Broken("two levels down")

        def depth(n):
            return trio.run(nested, n)

        async def nested(n):
            async with open_python_pool(1) as pool:
                if n:
                    return await pool.run_sync(depth, n - 1)
                try:
                    await pool.run_sync(fail)
                except Broken:
                    return await pool.run_sync(move, Point(1))

        async def main():
            async with open_python_pool(1) as pool:
                point = await pool.run_sync(depth, 1)
                assert type(point) is Point
                assert point.x == 2
                try:
                    await pool.run_sync(fail)
                except Broken:
                    print("done")

        if __name__ == "__main__":
            trio.run(main)
        """,
        tmp_path,
    )
    assert done(finished) == "done\n"
    assert notes(tmp_path) == ["__main__", "__mp_main__", "__mp_main__", "__mp_main__"]


def test_nested_pool_in_a_job_of_another_module(tmp_path: Path) -> None:
    """Point 2: a library's job with a pool of its own never runs the main module."""
    (tmp_path / "library.py").write_text(
        textwrap.dedent(
            """\
            import math, trio
            from trio_workers import open_python_pool

            async def run():
                async with open_python_pool(1) as pool:
                    return await pool.run_sync(math.factorial, 5)

            def job():
                return trio.run(run)
            """
        )
    )
    finished = run_text(
        """\
        import library

        async def main():
            async with open_python_pool(1) as pool:
                print(await pool.run_sync(library.job))

        trio.run(main)
        """,
        tmp_path,
    )
    assert done(finished) == "120\n"
    assert notes(tmp_path) == ["__main__"]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_main_module_beside_multiprocessing(first: bool, tmp_path: Path) -> None:
    """Point 2: multiprocessing, which has its own idea of `__mp_main__`, may be imported before or after."""
    finished = run_text(
        f"""\
        from tests import python_child_jobs as jobs

        class Point:
            pass

        def same(point):
            assert type(point) is Point
            return point

        async def main():
            async with open_python_pool(1) as pool:
                for use in {[first, not first]}:
                    if use:
                        await pool.run_sync(jobs.use_multiprocessing)
                    else:
                        assert type(await pool.run_sync(same, Point())) is Point
                assert type(await pool.run_sync(same, Point())) is Point
                print("done")

        if __name__ == "__main__":
            trio.run(main)
        """,
        tmp_path,
    )
    assert done(finished) == "done\n"
    assert notes(tmp_path) == ["__main__", "__mp_main__"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_of_a_function_of_main(method: str, tmp_path: Path) -> None:
    """Points 2 and 3: a job of the main module gives another function of it to multiprocessing, however that starts."""
    finished = run_text(
        f"""\
        import multiprocessing

        class Point:
            def __init__(self, x):
                self.x = x

        def move(point):
            assert type(point) is Point
            return Point(point.x + 1)

        def job():
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                points = pool.map(move, [Point(1), Point(2)])
                pool.close()
                pool.join()
            return points

        async def main():
            async with open_python_pool(1) as pool:
                points = await pool.run_sync(job)
                assert type(points[0]) is Point
                print([point.x for point in points])

        if __name__ == "__main__":
            trio.run(main)
        """,
        tmp_path,
    )
    assert done(finished) == "[2, 3]\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pool_in_a_process_of_multiprocessing(method: str, tmp_path: Path) -> None:
    """Point 2: a process made by multiprocessing, whose main module has the other name, opens a pool for jobs of it."""
    finished = run_text(
        f"""\
        import multiprocessing

        class Point:
            pass

        def same(point):
            assert type(point) is Point
            return point

        async def main():
            async with open_python_pool(1) as pool:
                assert type(await pool.run_sync(same, Point())) is Point
                print("done", flush=True)

        def run():
            trio.run(main)

        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=run)
            process.start()
            process.join()
            sys.exit(process.exitcode)
        """,
        tmp_path,
    )
    assert done(finished) == "done\n"
