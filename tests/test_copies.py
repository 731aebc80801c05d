"""Each script stands alone, and what several share is the same to the letter.

Compared is the source itself, comments included, of every function, class and constant at the
top level of a script. Names that stand for different things in different designs are listed.
"""
import ast
import collections
import difflib
import functools
import re

import pytest
from conftest import EVENT_DRIVEN, SERVERS, TOP

SCRIPTS = sorted(path.name for path in TOP.glob('*.py'))
BLOCKING = [name for name in SERVERS if name not in EVENT_DRIVEN]

# Which scripts share one version of a name that has several; every other name has one alone.
VERSIONS = {
    'handle': [BLOCKING, EVENT_DRIVEN],
    'handler': [['selsigrace.py'], ['selfpipe.py']],
    'wait': [['server02.py'], ['server06.py'], ['server07.py']],
    'serve': [['server03.py'], ['server03a.py'], ['server04.py'], ['server08.py']],
    'fill_pool': [['server03.py'], ['server03a.py'], ['server04.py'], ['server08.py']],
    'start_child': [['server01.py'], ['client.py']],
    'reap': [['server01.py', 'server03.py'], ['server03a.py'], ['client.py']],
    'TIMEOUT': [SERVERS, ['client.py']],
    'RECV_SIZE': [SERVERS, ['client.py']],
    'poller': [['server04.py', 'server06.py'], ['server07.py']],
    'unregister': [['server02.py'], ['server07.py']],
    'register': [['server02.py']],
    'READ': [['server02.py'], ['server06.py'], ['server07.py']],
    'children': [['server01.py', 'server03.py'], ['server03a.py', 'server04.py', 'client.py']],
    'connection': [['sendfile_demo.py'], ['tcpcork_demo.py']],
}
DIFFERENT_EVERYWHERE = {'main', 'parse_options', 'SIGNALS'}


def definitions(name):
    """Give the name and the source of each definition at the top level of a script."""
    source = (TOP / name).read_text()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        text = '\n'.join(lines[node.lineno - 1:node.end_lineno])
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, text
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, ast.dump(node.value)


@functools.lru_cache(maxsize=None)
def shared():
    """Return {name: {source: [scripts]}} of what more than one script defines."""
    table = collections.defaultdict(lambda: collections.defaultdict(list))
    for script in SCRIPTS:
        for name, text in definitions(script):
            table[name][text].append(script)
    return {name: versions for name, versions in table.items()
            if sum(map(len, versions.values())) > 1}


@pytest.mark.parametrize('name', sorted(set(shared()) - DIFFERENT_EVERYWHERE))
def test_copies_agree(name):
    found = sorted(sorted(scripts) for scripts in shared()[name].values())
    if name in VERSIONS:
        assert found == sorted(sorted(scripts) for scripts in VERSIONS[name])
    else:
        assert len(found) == 1


def body(script, name):
    """Return the code of one function, docstring left out, for comparison."""
    for node in ast.parse((TOP / script).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.body = node.body[ast.get_docstring(node) is not None:]
            return node


def test_handle_waits_or_yields_and_is_the_same():
    """Where handle() of the blocking servers waits, the other one yields; no other difference."""
    def plain(script):
        handle = ast.unparse(body(script, 'handle')).replace('(OSError, GeneratorExit)', 'OSError')
        return [line.strip() for line in handle.splitlines()
                if not any(word in line for word in ('yield', 'settimeout', 'BlockingIOError',
                                                     'if remaining or received:'))]
    assert plain('server01.py') == plain('server02.py')


def test_event_driven_servers_differ_only_in_how_they_wait():
    """Line by line: the docstring, the few names that wait, and the limit of descriptors."""
    how = {'register', 'modify', 'unregister', 'wait', 'READ', 'poller', 'FD_SETSIZE'}
    rest = [[(name, text) for name, text in definitions(script) if name not in how | {'main'}]
            for script in EVENT_DRIVEN]
    assert rest[0] == rest[1] == rest[2]
    mains = [ast.unparse(body(script, 'main')).replace('min(hard, FD_SETSIZE)', 'hard')
             for script in EVENT_DRIVEN]
    assert mains[0] == mains[1] == mains[2]


@pytest.mark.parametrize('one, other, most', [
    ('server03.py', 'server04.py', 125), ('server01.py', 'server05.py', 70),
    ('server03.py', 'server08.py', 70), ('server06.py', 'server07.py', 22)])
def test_neighbours_differ_in_the_idea_alone(one, other, most):
    """Count the lines that diff would show."""
    texts = [(TOP / name).read_text().splitlines() for name in (one, other)]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in '+-']
    assert len(changed) <= most


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_order_of_a_script(script):
    """Docstring, imports, constants and state; main(); what it calls; a divider; and the rest."""
    source = (TOP / script).read_text()
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    assert all(part in docstring for part in ('\nTry: ', '\nNotice: ', '\nSee also: '))
    assert f'python3 {script}' in docstring
    kinds = [type(node) for node in tree.body[1:]]
    imports = [kind in (ast.Import, ast.ImportFrom) for kind in kinds]
    assert imports == sorted(imports, reverse=True)
    divider, = re.findall('^# The (?:service|rest): .*$', source, re.MULTILINE)
    if script in SERVERS:
        assert divider == '# The service: the same in every server; read it once, in server01.py.'
    idea_ends = source[:source.index(divider)].count('\n')
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == 'main'
    assert functions[0].lineno <= 40
    assert functions[-1].lineno > idea_ends
    for number, function in enumerate(functions[1:], 1):
        if function.lineno < idea_ends:  # one that stands above calls it, or installs it
            above = ''.join(map(ast.unparse, functions[:number]))
            assert re.search(rf'\b{function.name}\b', above), function.name
    assert isinstance(tree.body[-1], ast.If)


@pytest.mark.parametrize('script', SCRIPTS)
def test_only_the_standard_library(script):
    allowed = set('argparse collections contextlib mmap os resource select signal socket stat '
                  'statistics struct sys tempfile threading time'.split())
    for node in ast.walk(ast.parse((TOP / script).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        assert not isinstance(node, ast.ImportFrom)


def test_nothing_else_at_the_top():
    known = {*SCRIPTS, 'tests', 'README.rst', 'LICENSE', '.gitignore', '.ci', '.git'}
    generated = ('.venv', '.pytest_cache', '__pycache__')
    assert all(path.name in known or path.name.startswith(generated) for path in TOP.iterdir())
    assert set(SCRIPTS) == {*SERVERS, 'client.py', 'rstserver.py', 'sigpipe.py', 'selsigrace.py',
                            'selfpipe.py', 'sendfile_demo.py', 'tcpcork_demo.py'}
