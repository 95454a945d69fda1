"""The report in a real browser: headless Chromium, driven by its own chromedriver."""

import json
import statistics
import threading
import time

import numpy as np
import pytest
from browser import available, browser, whole_page
from real_run import Bomb, train

from autotune import Decision, read_decisions
from autotune.callbacks import AutoLRS
from autotune.report.metrics import Series
from autotune.report.page import page
from autotune.report.reading import Run, read_run
from autotune.report.watch import ReportServer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(available() is not None, reason=str(available()))]

MARKERS = """
const box = document.querySelector('[data-figure="r0-timeline"]');
return box.data.filter(t => t.customdata).flatMap(
  t => t.customdata.map((index, i) => [index, t.name, t.x[i], t.hovertext[i]])).sort((a, b) => a[0] - b[0]);
"""
CONTRAST = """
const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
  .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return .2126*v[0] + .7152*v[1] + .0722*v[2]; };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!/rgba\\(.*, 0\\)/.test(c)) return c; } };
const worst = {};
for (const e of document.querySelectorAll('h1,h2,p,dt,dd b,dd span,td,th,caption,summary,label,legend,button')) {
  const a = lum(getComputedStyle(e).color), b = lum(behind(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  worst[e.tagName] = Math.min(worst[e.tagName] || 99, ratio);
}
return worst;
"""


def hover_text(driver):
    parts = driver.find_elements("css selector", ".hoverlayer .hovertext")
    return " ".join(part.text for part in parts).replace("\n", " ")


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real run under AutoLRS with a rollback in it."""
    trainer, _ = train(tmp_path_factory.mktemp("real"), [AutoLRS(search_budget=0.5), Bomb()])
    return read_run(trainer.log_dir)


@pytest.fixture(scope="module")
def file(real, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page([real]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def light(file):
    with browser() as driver:
        driver.get(file.as_uri())
        yield driver


def test_no_console_errors_and_nothing_is_fetched(light):
    assert light.get_log("browser") == []
    assert light.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_markers_match_the_log_one_for_one(light, real):
    markers = light.execute_script(MARKERS)
    assert [(m[0], m[1], m[2]) for m in markers] == [(i, d.kind, d.step) for i, d in enumerate(real.decisions)]
    rows = light.find_elements("css selector", "#r0-table tbody tr")
    assert len(rows) == len(real.decisions)
    drawn = light.execute_script("return document.querySelectorAll('.scatterlayer .points path.point').length")
    assert drawn >= len(real.decisions)
    assert {d.kind for d in real.decisions} >= {"setup", "search", "stage", "forecast", "rollback", "finish"}


def test_pointing_at_a_marker_shows_its_reason_and_cost(light, real):
    from selenium.webdriver import ActionChains

    index = next(i for i, d in enumerate(real.decisions) if d.kind == "search")
    place = light.execute_script(
        """
        const box = document.querySelector('[data-figure="r0-timeline"]'); box.scrollIntoView();
        const t = box.data.find(t => t.customdata && t.customdata.includes(arguments[0])), l = box._fullLayout;
        const i = t.customdata.indexOf(arguments[0]), r = box.getBoundingClientRect();
        return [r.left + l.xaxis._offset + l.xaxis.d2p(t.x[i]), r.top + l.yaxis._offset + l.yaxis.d2p(t.y[i])];
        """,
        index,
    )
    actions = ActionChains(light)
    actions.w3c_actions.pointer_action.move_to_location(round(place[0]), round(place[1]))
    actions.perform()
    text = wait_for(lambda: hover_text(light))
    assert " ".join(text.split()[:2]) == f"search: {real.decisions[index].action}"
    for word in real.decisions[index].reason.split():
        assert word in text
    assert "cost" in text


def test_the_keyboard_walks_the_decisions(light, real):
    from selenium.webdriver.common.keys import Keys

    box = light.find_element("css selector", '[data-figure="r0-timeline"]')
    light.execute_script("arguments[0].focus()", box)
    box.send_keys(Keys.HOME)
    assert wait_for(lambda: "setup: begin" in hover_text(light))
    box.send_keys(Keys.ARROW_RIGHT)
    assert wait_for(lambda: "search: set_lr" in hover_text(light))
    box.send_keys(Keys.ENTER)
    assert light.execute_script("return document.activeElement.id") == "r0-d1"
    reachable = light.execute_script(
        "return [...document.querySelectorAll('button,input,summary,.figure')].every(e => e.tabIndex === 0)"
    )
    assert reachable


def test_the_table_filters_by_kind_and_by_word(light, real):
    shown = "return [...document.querySelectorAll('#r0-table tbody tr')].filter(r => !r.hidden).length"
    light.find_element("css selector", 'input[data-kind="stage"]').click()
    stages = sum(d.kind == "stage" for d in real.decisions)
    assert light.execute_script(shown) == len(real.decisions) - stages > 0
    light.find_element("css selector", 'input[data-kind="stage"]').click()
    light.find_element("css selector", "input[data-find]").send_keys("back to step")
    assert light.execute_script(shown) == sum("back to step" in d.reason for d in real.decisions)
    light.find_element("css selector", "input[data-find]").clear()


def test_a_search_opens_with_all_its_candidates(light, real):
    light.execute_script("document.querySelector('details').open = true")
    search = next(d for d in real.decisions if d.kind == "search")
    drawn = """
    const box = document.querySelector('details .figure');
    return box.data ? box.data.filter(t => t.mode === 'markers').flatMap(t => t.x).length : 0;
    """
    assert wait_for(lambda: light.execute_script(drawn)) == len(search.numbers["candidates"])
    curves = "return document.querySelectorAll('details .figure')[1].data.length"
    assert light.execute_script(curves) == len(search.numbers["candidates"])
    assert light.get_log("browser") == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_themes_and_widths(file, tmp_path, width, dark):
    with browser(width, 844, dark) as driver:
        driver.get(file.as_uri())
        assert driver.execute_script("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wait_for(lambda: driver.execute_script("return document.querySelectorAll('details .js-plotly-plot').length"))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        contrast = driver.execute_script(CONTRAST)
        assert min(contrast.values()) >= 4.5, contrast
        right = "const edges = [...document.querySelectorAll('.figure svg')].map(s => s.getBoundingClientRect().right);"
        right += "return Math.max(...edges)"
        assert driver.execute_script(right) <= width
        whole_page(driver, tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        before = driver.execute_script("return document.querySelector('.figure')._fullLayout.font.color")
        driver.find_element("id", "theme").click()
        after = driver.execute_script("return document.querySelector('.figure')._fullLayout.font.color")
        assert before != after
        assert driver.get_log("browser") == []


def test_the_examples_axis(tiny, tmp_path):
    path = tmp_path / "r.html"
    path.write_text(page([read_run(tiny.folder)]), encoding="utf-8")
    with browser() as driver:
        driver.get(path.as_uri())
        driver.find_element("css selector", 'input[value="examples"]').click()
        last = driver.execute_script(MARKERS)[-1][2]
        assert last == 20 * 16 + 40 * 32 + 80 * 64
        driver.find_element("css selector", 'input[value="updates"]').click()
        assert driver.execute_script(MARKERS)[-1][2] == 140


def test_runs_compared(tiny, other_tiny, tmp_path):
    path = tmp_path / "r.html"
    path.write_text(page([read_run(tiny.folder), read_run(other_tiny.folder)]), encoding="utf-8")
    with browser() as driver:
        driver.get(path.as_uri())
        names = driver.execute_script(
            "return [...new Set(document.querySelector('[data-figure=comparison]').data.map(t => t.name))]"
        )
        assert names == [tiny.folder.name, other_tiny.folder.name]
        driver.execute_script("document.querySelectorAll('details.run')[1].open = true")
        drawn = "return !!document.querySelector('[data-figure=\"r1-timeline\"]').data"
        assert wait_for(lambda: driver.execute_script(drawn))
        assert driver.get_log("browser") == []


def big_run(path):
    """100,000 steps and 2,000 decisions, 200 of them searches with their trials."""
    rng = np.random.default_rng(0)
    steps = np.arange(100_000.0)
    loss = 2.0 * np.exp(-steps / 3e4) + 0.3 + 0.2 * rng.standard_normal(len(steps))
    loss[77_777] = 50.0
    metrics = {
        "train_loss": Series(steps, loss),
        "val_loss": Series(steps[::100], loss[::100]),
        "autotune/lr": Series(steps, 0.1 * (1 - steps / 1e5)),
        "autotune/noise_scale": Series(steps, 1e3 * np.exp(rng.standard_normal(len(steps)))),
    }
    decisions = [Decision("setup", "begin", "a long run", 0, numbers={"monitor": "val_loss", "batch_size": 32})]
    for index in range(1998):
        step = 50 * index
        if index % 10:
            kind, action = [("forecast", "predict"), ("stage", "end"), ("batch", "grow")][index % 3]
            numbers = {"target_step": step + 50, "prediction": 1.0, "low": 0.8, "high": 1.2, "stage": index}
            decisions.append(Decision(kind, action, f"reason {index}: " + "because " * 12, step, numbers=numbers))
            continue
        candidates = [
            {"lr": 10.0 ** (-k / 2), "horizon_steps": 400, "steps": 400, "status": "finished", "loss": 1.0 + k,
             "curve": [[s, 2.0 + rng.standard_normal()] for s in range(400)]}
            for k in range(7)
        ]  # fmt: skip
        grid = np.logspace(-6, 1, 60).tolist()
        posterior = {"lr": grid, "mean": grid, "sd": grid, "acquisition": grid}
        numbers = {"lr": 0.1, "initial_loss": 3.0, "candidates": candidates, "posterior": posterior}
        decisions.append(Decision("search", "set_lr", f"reason {index}", step, numbers=numbers, cost_steps=2800.0))
    decisions.append(Decision("finish", "end", "done", 100_000))
    return Run("big", path, tuple(decisions), metrics)


def test_a_long_run_opens_fast_and_stays_small(tiny, tmp_path):
    run = big_run(tmp_path / "decisions.jsonl")
    path, small = tmp_path / "big.html", tmp_path / "small.html"
    path.write_text(page([run]), encoding="utf-8")
    small.write_text(page([read_run(tiny.folder)]), encoding="utf-8")
    assert len(run.decisions) == 2000
    assert path.stat().st_size < 10_000_000
    opened = []
    with browser() as driver:
        # The page's own time on the main thread, in a browser that has started, at the median of three openings: a
        # browser's first page, and what else the machine is doing for a moment, are not the page's.
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        for address in (small, path, path, path):
            driver.get(address.as_uri())
            wall = driver.execute_script("return document.documentElement.dataset.ready")
            metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            seconds = next(item["value"] for item in metrics if item["name"] == "TaskDuration")
            opened.append((seconds, wall))
            driver.get("about:blank")
        driver.get(path.as_uri())
        assert len(driver.execute_script(MARKERS)) == 2000
        peak = "return Math.max(...document.querySelector('.figure').data.find(t => t.name === 'train_loss').y)"
        assert driver.execute_script(peak) == 50.0
    print(f"\nsize {path.stat().st_size / 1e6:.2f} MB; s of the main thread, ms until drawn: {opened}")
    assert all(seconds > 0 and wall for seconds, wall in opened)
    assert statistics.median(seconds for seconds, _ in opened[1:]) < 3


def test_watching_follows_and_keeps_what_the_reader_did(tiny, tmp_path):
    lines = (tiny.folder / "decisions.jsonl").read_text().splitlines(keepends=True)
    log = tmp_path / "decisions.jsonl"
    log.write_text("".join(lines[:3]))
    with ReportServer([str(tmp_path)]) as server, browser() as driver:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        driver.get(server.url)
        assert wait_for(lambda: len(driver.execute_script(MARKERS)) == 3)
        assert wait_for(lambda: "Following" in driver.find_element("id", "live").text)
        driver.execute_script("document.querySelector('details').open = true")
        driver.find_element("css selector", "input[data-find]").send_keys("stage")
        driver.execute_script("Plotly.relayout(document.querySelector('.figure'), {'xaxis.range': [-3, 77]})")
        log.write_text("".join(lines))
        assert wait_for(lambda: len(driver.execute_script(MARKERS)) == len(lines))
        kept = """return [document.querySelector('details').open, document.querySelector('input[data-find]').value,
                  document.querySelector('.figure')._fullLayout.xaxis.range]"""
        assert driver.execute_script(kept) == [True, "stage", [-3, 77]]
        server.shutdown()
        thread.join()
        server.server_close()
        assert wait_for(lambda: "has stopped" in driver.find_element("id", "live").text)
        errors = [entry for entry in driver.get_log("browser") if "ERR_CONNECTION_REFUSED" not in entry["message"]]
        assert errors == []
    assert read_decisions(log) == tiny.decisions
    assert json.loads(lines[0])["kind"] == "setup"
