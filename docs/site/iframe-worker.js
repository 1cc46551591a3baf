// The search of a site that is opened from disk. Browsers start no Worker for such pages, so here a hidden frame runs
// the script of the search. The theme's `offline` plugin loads this file because of its name; it would load one from
// the network otherwise.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.document.open();
      inner.document.write("<body></body>");
      inner.document.close();
      const run = (source) => new Promise((resolve, reject) => {
        const script = Object.assign(inner.document.createElement("script"), {src: source});
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${source} cannot be loaded`));
        inner.document.body.append(script);
      });
      // what the script finds in the scope of a Worker
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      inner.importScripts = async (...sources) => {
        for (const source of sources) await run(source);
      };
      this.ready = run(url);
    }

    postMessage(data) {
      const message = structuredClone(data);
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data: message})));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
