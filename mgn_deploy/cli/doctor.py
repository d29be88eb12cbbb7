"""`mgn-deploy doctor`."""

from __future__ import annotations

import typer

from mgn_deploy.cli.console import print_json, print_table


def doctor(json: bool = typer.Option(False, "--json", help="Print as JSON.")) -> None:
    """Show what this machine can run, why the rest cannot, and what to install."""
    from mgn_deploy.doctor import examine, machine_facts

    facts, findings = machine_facts(), examine()
    if json:
        print_json({"machine": facts, "parts": [vars(finding) for finding in findings]})
        return
    print_table(
        ["machine", ""],
        [[key, ", ".join(value) or "none" if isinstance(value, list) else str(value)] for key, value in facts.items()],
    )
    print_table(
        ["part", "version", "here"],
        [[one.part, one.version, one.problem or "yes"] for one in findings],
    )
