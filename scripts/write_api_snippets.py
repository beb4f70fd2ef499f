"""Writes recipes/lora_experts/data/{requests,stripe,flask}.jsonl: short programs against three libraries' interfaces.

The stream of plan_stream.yaml needs at least 64 snippets of each; every one here is a task in words and the code that
does it, made from a pattern and the names filled into it. Run again, it writes the same files.

    python scripts/write_api_snippets.py
"""

from __future__ import annotations

import json
from pathlib import Path

OUT = Path(__file__).parents[1] / "recipes" / "lora_experts" / "data"
THINGS = ["user", "order", "invoice", "ticket", "article", "photo"]

Pattern = tuple[str, str]
PATTERNS: dict[str, list[Pattern]] = {
    "requests": [
        ("Fetch {a} {thing} by id and return its JSON.", "import requests\n\ndef get_{thing}({thing}_id):\n    response = requests.get(f\"https://api.example.com/{thing}s/{{{thing}_id}}\", timeout=10)\n    response.raise_for_status()\n    return response.json()"),
        ("Create {a} {thing} with a POST request and return the new id.", "import requests\n\ndef create_{thing}(data):\n    response = requests.post(\"https://api.example.com/{thing}s\", json=data, timeout=10)\n    response.raise_for_status()\n    return response.json()[\"id\"]"),
        ("Delete {a} {thing}; return True if the server answered 204.", "import requests\n\ndef delete_{thing}({thing}_id):\n    response = requests.delete(f\"https://api.example.com/{thing}s/{{{thing}_id}}\", timeout=10)\n    return response.status_code == 204"),
        ("Change one field of {a} {thing} with PATCH.", "import requests\n\ndef patch_{thing}({thing}_id, field, value):\n    url = f\"https://api.example.com/{thing}s/{{{thing}_id}}\"\n    response = requests.patch(url, json={{field: value}}, timeout=10)\n    response.raise_for_status()\n    return response.json()"),
        ("List all {thing}s, following pages until there is none.", "import requests\n\ndef all_{thing}s():\n    found, page = [], 1\n    while True:\n        response = requests.get(\"https://api.example.com/{thing}s\", params={{\"page\": page}}, timeout=10)\n        response.raise_for_status()\n        batch = response.json()\n        if not batch:\n            return found\n        found += batch\n        page += 1"),
        ("Read {thing}s with a session that sends a bearer token.", "import requests\n\ndef {thing}_session(token):\n    session = requests.Session()\n    session.headers[\"Authorization\"] = f\"Bearer {{token}}\"\n    return session.get(\"https://api.example.com/{thing}s\", timeout=10).json()"),
        ("Upload a file to {a} {thing}.", "import requests\n\ndef attach_to_{thing}({thing}_id, path):\n    url = f\"https://api.example.com/{thing}s/{{{thing}_id}}/files\"\n    with open(path, \"rb\") as file:\n        response = requests.post(url, files={{\"file\": file}}, timeout=60)\n    response.raise_for_status()"),
        ("Download the PDF of {a} {thing} in chunks.", "import requests\n\ndef save_{thing}({thing}_id, path):\n    url = f\"https://api.example.com/{thing}s/{{{thing}_id}}.pdf\"\n    with requests.get(url, stream=True, timeout=60) as response:\n        response.raise_for_status()\n        with open(path, \"wb\") as file:\n            for chunk in response.iter_content(8192):\n                file.write(chunk)"),
        ("Get {a} {thing}, None if it does not exist, and retry on server errors.", "import requests\nfrom requests.adapters import HTTPAdapter\nfrom urllib3.util.retry import Retry\n\ndef find_{thing}({thing}_id):\n    session = requests.Session()\n    session.mount(\"https://\", HTTPAdapter(max_retries=Retry(3, status_forcelist=[502, 503])))\n    response = session.get(f\"https://api.example.com/{thing}s/{{{thing}_id}}\", timeout=10)\n    if response.status_code == 404:\n        return None\n    response.raise_for_status()\n    return response.json()"),
        ("Search {thing}s by name with basic authentication.", "import requests\n\ndef search_{thing}s(name, user, password):\n    response = requests.get(\"https://api.example.com/{thing}s\", params={{\"q\": name}}, auth=(user, password), timeout=10)\n    response.raise_for_status()\n    return response.json()[\"results\"]"),
        ("Return the error message when saving {a} {thing} times out.", "import requests\n\ndef try_saving_{thing}(data):\n    try:\n        requests.put(\"https://api.example.com/{thing}s\", json=data, timeout=2).raise_for_status()\n    except requests.Timeout:\n        return \"timed out\"\n    except requests.HTTPError as error:\n        return str(error)\n    return None"),
        ("Check with HEAD whether {a} {thing} has changed since an etag.", "import requests\n\ndef {thing}_changed({thing}_id, etag):\n    url = f\"https://api.example.com/{thing}s/{{{thing}_id}}\"\n    response = requests.head(url, headers={{\"If-None-Match\": etag}}, timeout=10)\n    return response.status_code != 304"),
    ],
    "stripe": [
        ("Charge a customer for {a} {thing} with a payment intent.", "import stripe\n\ndef pay_{thing}(customer, cents):\n    return stripe.PaymentIntent.create(amount=cents, currency=\"usd\", customer=customer, metadata={{\"kind\": \"{thing}\"}})"),
        ("Create a product called {thing} and a monthly price.", "import stripe\n\ndef {thing}_price(cents):\n    product = stripe.Product.create(name=\"{thing}\")\n    return stripe.Price.create(product=product.id, unit_amount=cents, currency=\"eur\", recurring={{\"interval\": \"month\"}})"),
        ("Refund the payment of {a} {thing}.", "import stripe\n\ndef refund_{thing}(payment_intent):\n    return stripe.Refund.create(payment_intent=payment_intent, reason=\"requested_by_customer\")"),
        ("Find the customer of {a} {thing} by mail, or create one.", "import stripe\n\ndef {thing}_customer(email):\n    found = stripe.Customer.list(email=email, limit=1).data\n    return found[0] if found else stripe.Customer.create(email=email)"),
        ("Start a checkout session for {a} {thing}.", "import stripe\n\ndef checkout_{thing}(price):\n    session = stripe.checkout.Session.create(\n        mode=\"payment\",\n        line_items=[{{\"price\": price, \"quantity\": 1}}],\n        success_url=\"https://example.com/{thing}/done\",\n        cancel_url=\"https://example.com/{thing}/back\",\n    )\n    return session.url"),
        ("Subscribe a customer to the {thing} plan with a trial week.", "import stripe\n\ndef subscribe_{thing}(customer, price):\n    return stripe.Subscription.create(customer=customer, items=[{{\"price\": price}}], trial_period_days=7)"),
        ("Cancel the {thing} subscription at the end of its period.", "import stripe\n\ndef cancel_{thing}(subscription):\n    return stripe.Subscription.modify(subscription, cancel_at_period_end=True)"),
        ("Verify a webhook about {a} {thing} and return the event type.", "import stripe\n\ndef {thing}_event(payload, signature, secret):\n    try:\n        event = stripe.Webhook.construct_event(payload, signature, secret)\n    except stripe.error.SignatureVerificationError:\n        return None\n    return event[\"type\"]"),
        ("Sum what customers paid for {thing}s.", "import stripe\n\ndef {thing}_revenue():\n    charges = stripe.Charge.list(limit=100)\n    return sum(c.amount for c in charges.auto_paging_iter() if c.metadata.get(\"kind\") == \"{thing}\")"),
        ("Tell the user why the card for {a} {thing} was declined.", "import stripe\n\ndef charge_{thing}(token, cents):\n    try:\n        stripe.Charge.create(amount=cents, currency=\"usd\", source=token, description=\"{thing}\")\n    except stripe.error.CardError as error:\n        return error.user_message\n    return None"),
        ("Send an invoice for {a} {thing}.", "import stripe\n\ndef bill_{thing}(customer, cents):\n    stripe.InvoiceItem.create(customer=customer, amount=cents, currency=\"usd\", description=\"{thing}\")\n    invoice = stripe.Invoice.create(customer=customer, collection_method=\"send_invoice\", days_until_due=14)\n    return stripe.Invoice.send_invoice(invoice.id)"),
        ("Give a quarter off {a} {thing} with a coupon.", "import stripe\n\ndef {thing}_coupon():\n    coupon = stripe.Coupon.create(percent_off=25, duration=\"once\", name=\"{thing} week\")\n    return stripe.PromotionCode.create(coupon=coupon.id).code"),
    ],
    "flask": [
        ("A route that returns {a} {thing} as JSON, 404 if it is unknown.", "from flask import Flask, abort, jsonify\n\napp = Flask(__name__)\n{thing}s = {{}}\n\n@app.get(\"/{thing}s/<int:{thing}_id>\")\ndef show_{thing}({thing}_id):\n    if {thing}_id not in {thing}s:\n        abort(404)\n    return jsonify({thing}s[{thing}_id])"),
        ("A route that creates {a} {thing} from a JSON body.", "from flask import Flask, request\n\napp = Flask(__name__)\n{thing}s = []\n\n@app.post(\"/{thing}s\")\ndef add_{thing}():\n    {thing}s.append(request.get_json())\n    return {{\"id\": len({thing}s) - 1}}, 201"),
        ("Render a page that lists every {thing}.", "from flask import Flask, render_template\n\napp = Flask(__name__)\n\n@app.route(\"/{thing}s\")\ndef list_{thing}s():\n    return render_template(\"{thing}s.html\", {thing}s=app.config[\"{thing}s\"])"),
        ("A blueprint for everything about {a} {thing}.", "from flask import Blueprint\n\n{thing}_pages = Blueprint(\"{thing}\", __name__, url_prefix=\"/{thing}\")\n\n@{thing}_pages.route(\"/\")\ndef index():\n    return \"all {thing}s\""),
        ("Show a message after the {thing} form was sent, then redirect.", "from flask import Flask, flash, redirect, request, url_for\n\napp = Flask(__name__)\n\n@app.post(\"/{thing}/new\")\ndef new_{thing}():\n    flash(f\"{thing} {{request.form['name']}} saved\")\n    return redirect(url_for(\"home\"))"),
        ("Remember the last {thing} in the session.", "from flask import Flask, session\n\napp = Flask(__name__)\napp.secret_key = \"change me\"\n\n@app.get(\"/{thing}/<name>\")\ndef visit_{thing}(name):\n    previous = session.get(\"{thing}\")\n    session[\"{thing}\"] = name\n    return {{\"previous\": previous}}"),
        ("An error handler for a missing {thing}.", "from flask import Flask, jsonify\n\napp = Flask(__name__)\n\nclass No{Thing}(Exception):\n    pass\n\n@app.errorhandler(No{Thing})\ndef missing_{thing}(error):\n    return jsonify(error=f\"no {thing}: {{error}}\"), 404"),
        ("Filter {thing}s by a query parameter with a default.", "from flask import Flask, request\n\napp = Flask(__name__)\n{thing}s = []\n\n@app.get(\"/{thing}s\")\ndef recent_{thing}s():\n    limit = request.args.get(\"limit\", default=10, type=int)\n    return {{\"{thing}s\": {thing}s[:limit]}}"),
        ("Test the {thing} route with Flask's client.", "from app import app\n\ndef test_{thing}():\n    client = app.test_client()\n    response = client.get(\"/{thing}s/1\")\n    assert response.status_code == 200\n    assert response.get_json()[\"id\"] == 1"),
        ("Require a header before any {thing} is changed.", "from flask import Flask, abort, request\n\napp = Flask(__name__)\n\n@app.before_request\ndef check_{thing}_key():\n    if request.method != \"GET\" and request.headers.get(\"X-{Thing}-Key\") != app.config[\"KEY\"]:\n        abort(401)"),
        ("A command that counts every {thing}.", "import click\nfrom flask import Flask\n\napp = Flask(__name__)\n\n@app.cli.command(\"count-{thing}s\")\ndef count_{thing}s():\n    click.echo(len(app.config[\"{thing}s\"]))"),
        ("Send the file of {a} {thing} as a download.", "from flask import Flask, send_from_directory\n\napp = Flask(__name__)\n\n@app.get(\"/{thing}s/<path:name>/file\")\ndef {thing}_file(name):\n    return send_from_directory(\"{thing}_files\", name, as_attachment=True)"),
    ],
}  # fmt: skip


def snippets(library: str) -> list[dict[str, str]]:
    rows = []
    for thing in THINGS:
        names = {"thing": thing, "Thing": thing.capitalize(), "a": "an" if thing[0] in "aeio" else "a"}
        for task, code in PATTERNS[library]:
            prompt = f"# {library}: {task.format(**names)}\n"
            rows.append({"prompt": prompt, "completion": code.format(**names)})
    return rows


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for library in PATTERNS:
        rows = snippets(library)
        for row in rows:
            compile(row["completion"], library, "exec")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (OUT / f"{library}.jsonl").write_text(text)
        print(f"{OUT / library}.jsonl: {len(rows)} snippets")
