import reference


def pytest_terminal_summary(terminalreporter):
    if not reference.measured:
        return
    terminalreporter.section("largest relative errors against the authors' code")
    for kind, error in sorted(reference.measured.items()):
        terminalreporter.write_line(f"{error:8.1e}  {kind}")
