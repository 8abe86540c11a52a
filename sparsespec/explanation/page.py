"""x"""


def html_page(e):
    return ""
