"""config/prometheus.yml, alerts.yml and grafana.json against what a running service exposes."""

from __future__ import annotations

import itertools
import json
import re
from datetime import timedelta
from typing import Any

import promql_parser
import pytest
import yaml

from app.settings import Settings
from tests.config.conftest import CONFIG
from tests.config.promql import TARGET, Exposed, QueryError, is_condition, labels_of, names_in

PROMETHEUS = yaml.safe_load((CONFIG / "prometheus.yml").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((CONFIG / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
BOARD = json.loads((CONFIG / "grafana.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
GRID_COLUMNS = 24


def as_sent(query: str) -> str:
    """A dashboard's query as Grafana sends it."""
    return query.replace("$__rate_interval", "1m")


def test_the_scraper_asks_where_the_service_listens() -> None:
    (scrape,) = PROMETHEUS["scrape_configs"]
    (static,) = scrape["static_configs"]
    host, port = Settings().host, Settings().port
    assert static["targets"] == [f"{host}:{port}"]
    assert scrape["metrics_path"] == "/metrics"
    for name in PROMETHEUS["rule_files"]:
        assert (CONFIG / name).is_file()


def test_the_commented_key_is_right_when_uncommented() -> None:
    text = (CONFIG / "prometheus.yml").read_text(encoding="utf-8")
    opened = re.sub(r"^( *)# (authorization:|  credentials_file:)", r"\1\2", text, flags=re.M)
    (scrape,) = yaml.safe_load(opened)["scrape_configs"]
    assert list(scrape["authorization"]) == ["credentials_file"]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_is_true_of_the_service(rule: dict[str, Any], exposed: Exposed) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert promql_parser.parse_duration(rule.get("for", "1s")) < timedelta(hours=1)
    labels = labels_of(rule["expr"], exposed)
    assert is_condition(rule["expr"])
    told = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
    assert set(told) <= labels
    for name in re.findall(r'job="(\w+)"', rule["expr"]):
        assert name == PROMETHEUS["scrape_configs"][0]["job_name"]


@pytest.mark.parametrize(
    ("title", "target"), TARGETS, ids=[f"{title}-{target['refId']}" for title, target in TARGETS]
)
def test_a_panel_is_true_of_the_service(
    title: str, target: dict[str, Any], exposed: Exposed
) -> None:
    labels = labels_of(as_sent(target["expr"]), exposed)
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels
    # Only the chosen services are shown.
    assert 'instance=~"$instance"' in target["expr"], title


def test_every_metric_of_the_service_has_its_panel(exposed: Exposed) -> None:
    shown = set().union(*(names_in(as_sent(target["expr"])) for _, target in TARGETS))
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in shown}
    for name in exposed.is_counter:
        if name.startswith("fluxd_"):
            assert re.sub(r"_(bucket|sum|count|total|created)$", "", name) in families, name


def test_the_dashboard_can_be_imported(exposed: Exposed) -> None:
    assert BOARD["schemaVersion"] >= 39
    assert "__inputs" not in BOARD
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    asked = variables["instance"]["query"]["query"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
    assert name in exposed.is_counter
    assert label in TARGET
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["datasource"]["query"] == source["type"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            assert panel["datasource"] == target["datasource"] == source
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids)


def test_no_panel_lies_on_another() -> None:
    for panel in BOARD["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= GRID_COLUMNS
    for first, second in itertools.combinations(BOARD["panels"], 2):
        a, b = first["gridPos"], second["gridPos"]
        assert (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        ), (first["title"], second["title"])


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("fluxd_queue_dept", "nothing is called fluxd_queue_dept"),
        ("rate(fluxd_image_total[5m])", "nothing is called fluxd_image_total"),
        ("sum by (stages) (rate(fluxd_stage_seconds_sum[5m]))", "no label stages"),
        ('increase(fluxd_jobs_total{result="completed"}[5m])', "has no label result"),
        ('increase(fluxd_jobs_total{outcome="complete"}[5m])', "never has outcome=complete"),
        ('increase(fluxd_rejections_total{reason=~"jobs|pixel"}[5m])', "never has reason=pixel"),
        ("sum(fluxd_images_total)", "a counter without a rate"),
        ("rate(fluxd_queue_depth[5m])", "a gauge under a rate"),
        (
            "histogram_quantile(0.9, sum by (stage) (rate(fluxd_stage_seconds_bucket[5m])))",
            "has lost its le",
        ),
        (
            "sum by (stage) (rate(fluxd_stage_seconds_sum[5m])) / sum(rate(fluxd_steps_total[5m]))",
            "never match",
        ),
        ("sum(fluxd_queue_depth", "unclosed"),
    ],
)
def test_a_wrong_query_is_caught(query: str, fault: str, exposed: Exposed) -> None:
    with pytest.raises(QueryError, match=fault):
        labels_of(query, exposed)
