"""The page at /, as one uses it: in a browser where there is one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

import moe_local
from support import browser as chromium

needs_browser = pytest.mark.skipif(
    not chromium.installed(), reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    window = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture(scope="module")
def small() -> Iterator[moe_local.Model]:
    """Half of the experts fit."""
    with moe_local.load("demo", slots=4, parallel=2, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def live(serving: Any, small: moe_local.Model) -> Iterator[Any]:
    with serving(small) as running:
        yield running


class Visit:
    """Somebody before a new tab with the page."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.size(1100, 700)
        browser.go(url)
        browser.run("sessionStorage.clear()")
        browser.go(url)
        browser.log()

    def ask(self, text: str) -> None:
        self.browser.type("#prompt", text + chromium.ENTER)

    def answered(self) -> str:
        """The last answer, when it has come to its end."""
        self.browser.until(lambda: self.browser.count(".assistant") and not self.browser.count(".writing"))
        text: str = self.browser.run(
            "return [...document.querySelectorAll('.assistant .text')].at(-1).innerText"
        )
        return text

    def wait_for(self, css: str, pattern: str) -> str:
        text = self.browser.until(
            lambda: re.search(pattern, self.browser.text(css)) and self.browser.text(css)
        )
        assert isinstance(text, str)
        return text


def test_what_the_page_may(server: Any) -> None:
    """Its own script and style, to the byte, and this server: nothing else."""
    reply = server.http.get(server.url)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", reply.text)
    links = set(re.findall(r"""(?:src|href)=["']([^"']+)""", reply.text))
    assert {link[:11] for link in links} == {"#prompt", "data:image/"}


@needs_browser
class TestInABrowser:
    @pytest.fixture
    def visit(self, browser: Any, live: Any) -> Iterator[Visit]:
        yield Visit(browser, live.url)
        assert browser.log() == []

    def test_a_talk_and_what_the_cache_does(
        self, visit: Visit, small: moe_local.Model, live: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        browser = visit.browser
        step = live.batcher._engine.step
        visit.wait_for("#about", r"demo · 4 of 8 experts a layer in RAM")
        assert browser.count("#ideas button") == 3
        browser.click("#settings")
        browser.type("#temperature", "0")
        browser.click("#set .main")
        with monkeypatch.context() as slowly:
            # an answer that came all at once, to a browser that stood still meanwhile, would have no speed
            slowly.setattr(live.batcher._engine, "step", lambda: (time.sleep(0.01), step())[1])
            visit.ask("What is an expert?")
            answer = visit.answered()
        first = [{"role": "user", "content": "What is an expert?"}]
        assert answer == small.generate(first, do_sample=False).text
        assert browser.count("#empty") == 0
        visit.wait_for(".foot", r"\d+ tokens · [\d.]+ tok/s")
        assert float(visit.wait_for("#speed", r"\d")) > 0
        assert 0 < float(browser.text("#hits")) < 100
        assert re.search("disk [\\d.]+ ms", browser.text("#causes"))
        assert "20 of 40" in browser.text("#sums")
        shades = browser.run(
            "const map = document.querySelector('#map'), all = map.getContext('2d')"
            ".getImageData(0, 0, map.width, map.height).data, seen = new Set();"
            "for (let i = 0; i < all.length; i += 4) seen.add(all.slice(i, i + 3).join());"
            "return [...seen]"
        )
        assert {"159,182,216", "228,231,234"} <= set(shades), "resident and absent"

        # where the map says that an expert is, there it is, once it has seen what `generate` did, too
        def seen() -> Any:
            report = live.http.get(f"{live.url}/v1/cache").json()
            mapped = browser.run("return [map.report.uses, map.report.states]")
            return report if mapped == [report["uses"], report["states"]] else None

        report = browser.until(seen)
        browser.until(lambda: browser.run("return map.report.running === 0 && map.at.some(at => at > 0)"))
        for layer, expert in ((0, 0), (4, 7), (2, 3)):
            w, h = browser.run("return [map.place.w, map.place.h]")
            browser.point("#map", round((expert + 0.5) * w), round((layer + 0.5) * h))
            state = ("absent", "resident", "loading")[int(report["states"][layer][expert])]
            uses = report["uses"][layer][expert]
            tip = visit.wait_for("#tip", f"Layer {layer}, expert {expert}:")
            assert f": {state}, used {uses:,} times" in tip
        browser.point("#map", -20, -20)
        browser.run("document.querySelector('#map').focus()")
        browser.type("#map", chromium.RIGHT + chromium.RIGHT + chromium.DOWN)
        visit.wait_for("#tip", "Layer 1, expert 1:")
        # the next turn goes on from this one, also when the page was loaded anew
        browser.go(live.url)
        assert visit.answered() == small.generate(first, do_sample=False).text
        visit.ask("And why?")
        visit.wait_for(".assistant:last-child .foot", r"\d+ of \d+ prompt tokens known")
        resources = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert resources
        assert all(name.startswith(live.url) for name in resources)

    @pytest.mark.slow
    def test_on_a_phone(self, visit: Visit) -> None:
        browser = visit.browser
        for dark in (False, True):
            browser.size(360, 640, dark=dark)
            wide = "return document.scrollingElement.scrollWidth"
            assert browser.run(wide) == 360
            assert browser.count("#map") == 1
            browser.click("#fold")
            assert browser.count("#map") == 0
            browser.click("#fold")
        browser.click("#ideas button")
        assert visit.answered()
        assert browser.run(wide) == 360
        visit.wait_for("#causes", "computing")  # what grows above takes nothing away below
        below = (
            "return document.querySelector('#main').scrollHeight - document.querySelector('#main').scrollTop"
        )
        shown = "return document.querySelector('#main').clientHeight"
        browser.size(360, 400)
        browser.until(lambda: browser.run(below) - browser.run(shown) < 2)
        browser.run("document.querySelector('#main').scrollTop = 0")
        browser.size(360, 380)
        assert browser.run("return document.querySelector('#main').scrollTop") == 0
        browser.click("#new")
        assert browser.count("#empty") == 1
        assert browser.count(".turn") == 0

    @pytest.mark.parametrize(("layers", "experts"), [(32, 8), (48, 128), (61, 256)])
    def test_maps_of_all_sizes(self, visit: Visit, layers: int, experts: int) -> None:
        browser = visit.browser
        visit.wait_for("#about", "experts")
        took = browser.run(
            """
            const [layers, experts] = arguments;
            round++;  // the server is not looked at any more
            const report = used => ({
                ...map.report, time: used, tier: "vram", slots: Array(layers).fill(Math.ceil(experts / 4)),
                states: Array.from({ length: layers }, (_, l) =>
                    Array.from({ length: experts }, (_, e) => "1002"[(e + l) % 4]).join("")),
                uses: Array.from({ length: layers }, (_, l) =>
                    Array.from({ length: experts }, (_, e) => used * ((l * 7 + e) % 5 === 0))),
            });
            map.set(report(1));
            let least = Infinity;  // of some times: a busy machine is not the page's fault
            for (let used = 2; used < 7; used++) {
                const now = report(used), began = performance.now();
                map.set(now);
                figures(map.report);
                least = Math.min(least, performance.now() - began);
            }
            return least;
            """,
            layers,
            experts,
        )
        assert took < 500
        layer, expert = layers - 2, experts - 3
        w, h, across = browser.run("return [map.place.w, map.place.h, map.place.across]")
        column, row = (expert, layer) if across else (layer, expert)
        assert across == (experts > layers)
        browser.point("#map", int((column + 0.5) * w), int((row + 0.5) * h))
        state = ("resident", "absent", "absent", "loading")[(expert + layer) % 4]
        visit.wait_for("#tip", rf"Layer {layer}, expert {expert}: {state}, used \d")
        assert f"{layers} layers" in browser.text("#axes")
        box = browser.run(
            "const b = document.querySelector('#map').getBoundingClientRect(); return [b.width, b.height]"
        )
        assert box[0] <= 450
        assert box[1] <= 0.46 * 700 + 1


HOSTILE = """<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>

# A <b>title</b>

[a link](https://example.org/a) and [none](javascript:window.hacked=3), **bold *and* `code`**

1. one
2. two
   - under *two*

```html
<script>window.hacked = 4</script>
```
> quoted & <i>done</i>

| a | **b** |
| --- | ---: |
| <u>1</u> | 2 |
"""


@needs_browser
class TestWrittenAnswers:
    @pytest.fixture
    def visit(self, browser: Any, serving: Any, scripted: Any, request: Any) -> Iterator[Visit]:
        text, options = request.param
        self.says = scripted(text, **options)
        with serving(self.says) as running:
            yield Visit(browser, running.url)

    @pytest.mark.parametrize("visit", [(HOSTILE, {})], indirect=True)
    def test_what_models_write_is_text(self, visit: Visit) -> None:
        browser = visit.browser
        visit.ask("<b>hello</b>")
        visit.answered()
        assert browser.text(".user") == "<b>hello</b>"
        inside = "return [...document.querySelectorAll('.text *')].map(e => e.tagName.toLowerCase())"
        allowed = "p h3 a strong em code ol ul li div span button pre blockquote table tr th td"
        assert set(browser.run(inside)) <= set(allowed.split())
        assert browser.run("return window.hacked ?? null") is None
        assert browser.run("return [...document.querySelectorAll('.text a')].map(a => a.href)") == [
            "https://example.org/a"
        ]
        assert browser.text(".text h3") == "A <b>title</b>"
        assert browser.text(".text strong") == "bold and code"
        assert browser.text(".text strong em") == "and"
        assert browser.text(".text pre") == "<script>window.hacked = 4</script>"
        assert browser.text(".text ol li ul li") == "under two"
        assert browser.run("return [...document.querySelectorAll('th, td')].map(c => c.innerText)") == [
            *("a", "b", "<u>1</u>", "2")
        ]
        assert browser.text(".text blockquote") == "quoted & <i>done</i>"
        assert "[none](javascript:" in browser.text(".text")
        assert browser.log() == []
        # by selection, as where the page came over http from another machine; then into the clipboard itself
        browser.run("Object.defineProperty(navigator, 'clipboard', { value: null, configurable: true })")
        assert self.copied(visit, ".text .top button") == "<script>window.hacked = 4</script>"
        browser.run("delete navigator.clipboard; document.querySelector('#prompt').value = ''")
        browser.grant("clipboardSanitizedWrite")
        assert self.copied(visit, ".foot button") == HOSTILE

    def copied(self, visit: Visit, button: str) -> str:
        """What can be pasted once the button says that it has copied."""
        said = visit.browser.remember(button)
        visit.browser.click(button)
        visit.browser.until(lambda: "Copied" in said())
        visit.browser.type("#prompt", chromium.CONTROL + "v" + chromium.CONTROL)
        pasted: str = visit.browser.until(
            lambda: visit.browser.run("return document.querySelector('#prompt').value")
        )
        return pasted

    @pytest.mark.parametrize("visit", [("<think>Hm, let me see.</think>Yes.", {})], indirect=True)
    def test_thoughts(self, visit: Visit) -> None:
        visit.ask("Well?")
        assert visit.answered() == "Yes."
        assert (
            visit.browser.run("return document.querySelector('.thought div').textContent")
            == "Hm, let me see."
        )
        assert visit.browser.run("return document.querySelector('.thought').open") is False

    @pytest.mark.slow
    @pytest.mark.parametrize("visit", [("word ", {"times": 2000, "pause_s": 0.02})], indirect=True)
    def test_stop_and_again(self, visit: Visit) -> None:
        browser = visit.browser
        for number, stop in enumerate(
            (lambda: browser.click("#stop"), lambda: browser.type("#prompt", chromium.ESCAPE))
        ):
            if number == 0:
                visit.ask("Talk.")
            else:
                browser.click(".again")
            visit.wait_for(".assistant .text", "word word")
            assert browser.count("#send") == 0
            stop()
            assert visit.answered().startswith("word")
            visit.wait_for(".foot", "stopped")
            assert browser.count(".assistant") == 1
            browser.until(lambda at=number: self.says.tickets[at].cancelled)
            assert browser.count("#send") == 1


@pytest.mark.slow
@needs_browser
def test_the_key(browser: Any, serving: Any, small: moe_local.Model) -> None:
    with serving(small, api_key="s3cret") as running:
        visit = Visit(browser, running.url)
        browser.until(lambda: browser.count("#locked") == 1)
        browser.type("#locked-key", "wrong" + chromium.ENTER)
        visit.wait_for("#locked-why", "The key was wrong")
        browser.type("#locked-key", "s3cret" + chromium.ENTER)
        visit.wait_for("#about", "demo")
        visit.ask("hello")
        assert visit.answered()
        assert browser.count(".error") == 0


@pytest.mark.slow
@needs_browser
def test_errors_in_words(browser: Any, serving: Any, small: moe_local.Model) -> None:
    with serving(small) as running:
        visit = Visit(browser, running.url)
        visit.wait_for("#about", "demo")
        browser.run("send('word '.repeat(5000))")
        visit.wait_for(".error", r"the prompt has \d+ tokens, the context holds 2048")
        visit.ask("hello")  # the message that was refused is not sent again
        browser.until(lambda: visit.answered())
        long = [{"role": "user", "content": "word " * 700}, {"role": "assistant", "content": "Yes."}]
        browser.run(f"kept.messages.unshift(...{json.dumps(3 * long)}); kept.max_tokens = '8'")
        visit.ask("hello")
        visit.wait_for(".assistant:last-child .foot", "the context is full: answered without the oldest")
        browser.click("#new")
    visit.ask("hello")
    visit.wait_for(".error", "The server cannot be reached. Is moe-local serve still running?")
    visit.wait_for("#live", "no connection")
    kept = json.loads(browser.run("return sessionStorage.getItem('moe-local')"))
    assert kept["messages"][0]["content"] == "hello"
    browser.click(".error button")
    visit.wait_for(".error", "The server cannot be reached")
    assert browser.count(".user") == browser.count(".error") == 1
