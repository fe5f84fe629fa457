// Search of a site that is opened from a disk. A page of file:// may start no worker, so the
// worker of the search runs in a hidden frame there; over HTTP nothing here is used.
if (location.protocol === 'file:') {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement('iframe');
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.answer = data => this.dispatchEvent(new MessageEvent('message', { data }));
      this.ready = new Promise(done => { frame.onload = done; });
      const { document: page } = this.inside;
      page.open();
      page.write('<script>postMessage = answer</' + 'script>');
      page.write(`<script src="${url}"></` + 'script>');
      page.close();
    }

    async postMessage(data) {
      await this.ready;
      this.inside.dispatchEvent(new MessageEvent('message', { data }));
    }
  };
}
