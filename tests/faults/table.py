"""All cases, in the order of the page."""

from __future__ import annotations

from tests.faults import cases_cluster, cases_hostile, cases_hosts, cases_life, cases_recovery, soak

CASES = sorted(
    [
        *cases_recovery.CASES,
        *cases_life.CASES,
        *cases_hostile.CASES,
        *cases_hosts.CASES,
        *cases_cluster.CASES,
        *soak.CASES,
    ],
    key=lambda case: (case.id[0] == "R", case.id),
)
