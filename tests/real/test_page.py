"""The page in a real browser: no error in its console, usable by keyboard, readable by all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.images import multi_platform
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

AXE = Path(__file__).with_name("axe") / "axe.min.js"
SERIOUS = """
const done = arguments[arguments.length - 1];
axe.run().then(found => done(found.violations
  .filter(each => ["serious", "critical"].includes(each.impact))
  .map(each => each.id + ": " + each.nodes.map(node => node.html).join(" "))));
"""

pytestmark = pytest.mark.real


def test_each_view_is_sound_in_light_and_dark_and_the_keyboard_reaches_all(
    browser: webdriver.Chrome, mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    upstream.add("app", multi_platform(), tag="1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]}, admin=True)
    name = f"{upstream.registry}/app:1"
    assert server.manifest(upstream.registry, "app", "1").status == 200
    url = f"http://127.0.0.1:{server.admin_port}"
    server.wait_for(
        lambda: name.encode() in server.admin("/contents").body, "the image listed", limit=60
    )
    views = ("/", "/contents", f"/image?reference={name}", "/store", "/log")
    for path in (*views, "/why", f"/why?reference={name}"):
        browser.get(url + path)
        browser.execute_script(AXE.read_text(encoding="utf-8"))
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            assert browser.execute_async_script(SERIOUS) == [], (path, scheme)

    # The first stop skips the navigation, the next ones are the views.
    browser.get(url)
    wait_for_text(browser, server, "state", "live")
    stops = []
    for _ in range(4):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        stops.append(browser.switch_to.active_element.text)
    assert stops == ["Skip to the content", "Now", "Contents", "Store"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    server.wait_for(lambda: browser.current_url == f"{url}/store", "the store's view")

    # A reference is typed, and explained.
    browser.get(f"{url}/why")
    field = browser.find_element(By.NAME, "reference")
    field.send_keys(name, Keys.ENTER)
    wait_for_text(browser, server, "main", "answered from the store")

    # What happens is seen without a reload.
    browser.get(f"{url}/log")
    server.manifest(upstream.registry, "app", "live-seen")
    wait_for_text(browser, server, "live", "live-seen")
    assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []  # type: ignore[no-untyped-call] # has none


def wait_for_text(browser: webdriver.Chrome, server: Mirror, element: str, text: str) -> None:
    # In one step: an element that was found may be of the view before by the time it is read.
    script = f"return document.getElementById('{element}')?.innerText ?? ''"
    server.wait_for(lambda: text in browser.execute_script(script), f"{text} shown")
