"A headless Chromium that a test drives through its debugging pipe: no driver program, no further package."
from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field

FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars', '--window-size=1400,1000',
         '--enable-unsafe-swiftshader', '--remote-debugging-pipe']


def find_chromium() -> str | None:
    "Path of an installed Chromium or Chrome."
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
    return next(filter(None, map(shutil.which, names)), None)


@dataclass
class Visit:
    "What happened while a page was open."
    url: str
    errors: list[str] = field(default_factory=list)  # console errors, exceptions, failed requests
    requests: list[str] = field(default_factory=list)  # every address that was fetched
    value: object = None  # what the script given to `visit` returned


class Browser:
    "One browser process with one tab."

    def __enter__(self) -> 'Browser':
        self.profile = tempfile.TemporaryDirectory(prefix='chromium-', ignore_cleanup_errors=True)
        to_read, self.send = os.pipe()
        self.receive, to_write = os.pipe()

        def wire() -> None:  # Chromium reads commands from descriptor 3 and writes answers to 4
            low, high = os.dup(to_read), os.dup(to_write)
            spare = [os.dup2(low, 200), os.dup2(high, 201)]
            os.dup2(spare[0], 3), os.dup2(spare[1], 4)

        command = [find_chromium(), *FLAGS, f'--user-data-dir={self.profile.name}', 'about:blank']
        self.process = subprocess.Popen(command, preexec_fn=wire, close_fds=False,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        self.buffer, self.count, self.events = b'', 0, []
        target = self.call('Target.createTarget', url='about:blank', session=False)['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True, session=False)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        return self

    def __exit__(self, *exc) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.send), os.close(self.receive)
        self.profile.cleanup()

    def next_message(self, timeout_s: float) -> dict | None:
        "One message of the browser, or None when none came in time."
        end = time.monotonic() + timeout_s
        while b'\0' not in self.buffer:
            ready, _, _ = select.select([self.receive], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(self.receive, 1 << 20)
            if not data:
                raise RuntimeError('the browser has stopped')
            self.buffer += data
        message, self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(message)

    def call(self, method: str, session: bool = True, **params) -> dict:
        "Send a command and wait for its answer; events on the way are kept."
        self.count += 1
        number = self.count
        message = {'id': number, 'method': method, 'params': params} | ({'sessionId': self.session} if session else {})
        os.write(self.send, json.dumps(message).encode() + b'\0')
        while (answer := self.next_message(60)) is not None:
            if answer.get('id') == number:
                if 'error' in answer:
                    raise RuntimeError(f'{method}: {answer["error"]["message"]}')
                return answer['result']
            self.events.append(answer)
        raise TimeoutError(f'{method}: no answer')

    def settle(self, until: str | None, quiet_s: float, timeout_s: float = 60) -> None:
        "Take events until one named `until` came, then until nothing happens for a moment."
        end = time.monotonic() + timeout_s
        while until and not any(e.get('method') == until for e in self.events):
            message = self.next_message(1)
            self.events += [message] if message else []
            if time.monotonic() > end:
                raise TimeoutError(f'{until} did not come')
        while (message := self.next_message(quiet_s)) is not None and time.monotonic() < end:
            self.events.append(message)

    def evaluate(self, script: str) -> object:
        "Value of a JavaScript expression in the page."
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in answer:
            raise RuntimeError(answer['exceptionDetails'].get('exception', {}).get('description', 'script failed'))
        return answer['result'].get('value')

    def visit(self, url: str, script: str = 'null') -> Visit:
        "Open a page, let it settle, run a script in it."
        self.events = []
        self.call('Page.navigate', url=url)
        self.settle('Page.loadEventFired', 0.5)
        out = Visit(url, value=self.evaluate(script))
        for event in self.events:
            complaint = describe(event)
            out.errors += [complaint] if complaint else []
            if event.get('method') == 'Network.requestWillBeSent':
                out.requests.append(event['params']['request']['url'])
        return out


def describe(event: dict) -> str | None:
    "What an event complains about, or None."
    method, p = event.get('method'), event.get('params', {})
    if method == 'Runtime.exceptionThrown':
        details = p['exceptionDetails']
        return f'exception: {details.get("exception", {}).get("description") or details["text"]}'
    if method == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'):
        return 'console: ' + ' '.join(str(a.get('value', a.get('description', ''))) for a in p['args'])
    if method == 'Log.entryAdded' and p['entry']['level'] == 'error':
        return f'log: {p["entry"]["text"]} {p["entry"].get("url", "")}'
    if method == 'Network.loadingFailed' and not p.get('canceled'):
        return f'request failed: {p["errorText"]}'
    if method == 'Network.responseReceived' and p['response']['status'] >= 400:
        return f'{p["response"]["status"]}: {p["response"]["url"]}'
    return None
