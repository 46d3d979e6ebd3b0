"""Device that the browser emulates."""

from __future__ import annotations

from selenium.webdriver.chrome.webdriver import WebDriver


def set_device(
    browser: WebDriver, width: int = 1280, height: int = 860, scheme: str = "light"
) -> None:
    """The window of a desktop or a phone, in light or dark colours."""
    phone = width < 600
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "mobile": phone})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
