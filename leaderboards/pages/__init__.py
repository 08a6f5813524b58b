"""A board as one page for the browser. Others call `page.write_page`."""
