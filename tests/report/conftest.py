"""Pages are looked at where a browser is installed."""

from tests.report.browser import BROWSER

collect_ignore = [] if BROWSER else ["test_browser.py", "test_browser_pictures.py", "test_html_browser.py"]
