"""The worker of standard_library.py: it counts what is in one Python source file."""

import ast
import json
import warnings

from trio_workers.child import Job, serve


def examine(job: Job) -> bytes:
    """Parse the body. What ast raises for a file that is no Python (there are some, for tests) is a job error."""
    tree = ast.parse(job.body)
    functions = classes = 0
    longest, name = 0, ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            classes += 1
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > longest:
                longest, name = length, node.name
    found = {"lines": len(job.body.splitlines()), "functions": functions, "classes": classes}
    return json.dumps({**found, "longest": longest, "name": name}).encode()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # old files hold what a newer Python warns of
    serve(examine)
