// The page at GET / in a real browser: node page_test.js NSQD_BINARY [PROXY_SCRIPT]
// PROXY_SCRIPT is for a daemon without the page: it is run as "node PROXY_SCRIPT PORT NSQD_PORT" and its address is used.
// CHROMIUM=path and SCREENSHOTS=dir are optional. The last line is "N passed, N failed".
'use strict';
const { spawn } = require('child_process'), fs = require('fs'), os = require('os'), path = require('path'), net = require('net');
const { chromium } = require('playwright-core');
const [binary, proxyScript] = process.argv.slice(2), shots = process.env.SCREENSHOTS;
const data = fs.mkdtempSync(path.join(os.tmpdir(), 'page_test-')), children = new Set();
const sleep = ms => new Promise(done => setTimeout(done, ms));
let passed = 0, failed = 0;

function check(what, ok, got) {
  ok ? passed++ : failed++;
  console.log(`${ok ? 'ok  ' : 'FAIL'} ${what}${ok || got === undefined ? '' : ': ' + JSON.stringify(got)}`);
}
async function until(what, probe, ms = 10000) {
  let got;
  for (const end = Date.now() + ms; Date.now() < end; await sleep(50)) {
    try { got = await probe(); if (got) return check(what, true); } catch (e) { got = e.message; }
  }
  check(what, false, got);
}
function freePort() {
  return new Promise(done => { const s = net.createServer().listen(0, '127.0.0.1', () => {
    const { port } = s.address(); s.close(() => done(port)); }); });
}
// Starts a program and waits until its output names an HTTP port.
function start(command, args) {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  children.add(child);
  child.gone = new Promise(done => child.once('exit', () => { children.delete(child); done(); }));
  return new Promise((done, fail) => {
    let log = '';
    const read = text => { log += text; const m = /HTTP: listening on 127\.0\.0\.1:(\d+)/.exec(log);
      if (m) done({ child, port: +m[1] }); };
    child.stdout.on('data', read); child.stderr.on('data', read);
    child.once('error', fail);
    child.once('exit', code => fail(Error(`${command} ended with ${code}: ${log}`)));
    setTimeout(() => fail(Error(`${command} did not listen: ${log}`)), 15000).unref();
  });
}
const daemon = port => start(binary, ['--data-path=' + data, '--tcp-address=127.0.0.1:0', '--http-address=127.0.0.1:' + port]);
async function stop(child) { child.kill('SIGTERM'); await child.gone; }

async function main() {
  const port = await freePort();
  let { child } = await daemon(port);
  const api = `http://127.0.0.1:${port}`;
  const base = proxyScript ? `http://127.0.0.1:${(await start('node', [proxyScript, '0', String(port)])).port}` : api;
  const post = async (what, body) => { const r = await fetch(`${api}/${what}`, { method: 'POST', body });
    if (!r.ok) throw Error(`${what}: ${r.status}`); };
  const stats = async () => (await fetch(`${api}/stats?format=json`)).json();
  const topic = async name => (await stats()).topics.find(t => t.topic_name === name);

  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--headless',
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'] });
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 } }), errors = [];
  let away = false;  // the browser itself reports each failed request while the daemon is gone
  page.on('console', m => { if (m.type() === 'error' && !(away && /Failed to load resource/.test(m.text())) && !/status of 413/.test(m.text())) errors.push(m.text()); });
  page.on('pageerror', e => errors.push(String(e)));
  page.on('request', r => { if (!r.url().startsWith(base) && !r.url().startsWith('data:')) errors.push('request to ' + r.url()); });
  const row = key => page.locator('tr', { has: page.locator(`button[aria-label$="${key}"]`) });
  const cell = (key, column) => row(key).locator('td.' + column).innerText();
  const toast = text => page.locator('#toast', { hasText: text }).waitFor({ timeout: 5000 }).then(() => true);

  const answer = await page.goto(base);
  check('GET / is an HTML page', answer.ok() && /text\/html/.test(answer.headers()['content-type']), answer.headers());
  await until('an empty daemon says what to try', async () => (await page.locator('#none').innerText()).includes('/pub?topic=clicks'));
  await until('version and health are shown', async () => /version 1\.3\.0.*health OK/.test(await page.locator('header').innerText()) && await page.locator('#problem').isHidden());

  await post('pub?topic=clicks', 'one');
  await until('a publish over HTTP shows', async () => await cell('topic clicks', 'depth') === '1');
  await post('channel/create?topic=clicks&channel=archive');
  await until('a new channel shows with the backlog', async () => await cell('channel archive of topic clicks', 'depth') === '1');
  await post('mpub?topic=clicks', 'a\nb\nc\n');
  await until('its depth follows', async () => await cell('channel archive of topic clicks', 'depth') === '4');

  await page.getByRole('button', { name: 'Pause channel archive of topic clicks', exact: true }).click();
  await until('pause reaches the daemon', async () => (await topic('clicks')).channels[0].paused);
  await until('and shows', () => row('channel archive of topic clicks').getByText('paused').isVisible());
  await page.getByRole('button', { name: 'Unpause channel archive of topic clicks', exact: true }).click();
  await until('unpause reaches the daemon', async () => !(await topic('clicks')).channels[0].paused);

  await page.getByRole('button', { name: 'Publish to topic clicks', exact: true }).click();
  check('the dialog names the topic', (await page.locator('dialog[open]').innerText()).includes('Publish to topic clicks'));
  await page.locator('dialog[open] [name=body]').fill('<b>typed</b>');
  await page.locator('dialog[open]').getByRole('button', { name: 'Publish', exact: true }).click();
  await until('the page publishes', async () => (await topic('clicks')).message_count === 5);
  await until('and says so', () => toast('Publish to topic clicks: done'));

  await page.getByRole('button', { name: 'Publish a message', exact: true }).click();
  await page.keyboard.type('fresh');
  await page.locator('dialog[open] [name=body]').fill('x'.repeat(1100000));
  await page.locator('dialog[open]').getByRole('button', { name: 'Publish', exact: true }).click();
  await until('a refusal is shown, and what was typed stays', async () => await toast('MSG_TOO_BIG') &&
    (await page.locator('dialog[open] [name=body]').inputValue()).length === 1100000);
  await page.locator('dialog[open] [name=body]').fill('y');
  await page.locator('dialog[open]').getByRole('button', { name: 'Publish', exact: true }).click();
  await until('the page publishes to a topic that is new', async () => (await topic('fresh')).depth === 1);
  await post('topic/delete?topic=fresh');

  await page.getByRole('button', { name: 'Create a topic', exact: true }).click();
  await page.keyboard.type('no spaces');
  await page.keyboard.press('Enter');
  check('a name that is none is refused', await page.locator('dialog[open] :invalid').count() > 0 && !(await topic('no spaces')));
  await page.keyboard.press('Control+A');
  await page.keyboard.type('orders#ephemeral');
  await page.keyboard.press('Enter');
  await until('the page creates a topic, by keyboard', () => topic('orders#ephemeral'));
  await page.getByRole('button', { name: 'Create a channel of topic orders#ephemeral', exact: true }).press('Enter');
  await page.keyboard.type('mail');
  await page.keyboard.press('Enter');
  await until('and a channel, by keyboard', async () => (await topic('orders#ephemeral')).channels[0].channel_name === 'mail');

  await until('the dialog closes by itself', async () => await page.locator('dialog[open]').count() === 0);
  await page.getByLabel('Filter by name').fill('ORDERS');
  await until('the filter narrows', async () => await page.locator('tr[id*="/"]:visible').count() === 2);
  await page.getByLabel('Filter by name').fill('');
  await until('and widens', async () => await page.locator('tr[id*="/"]:visible').count() === 4);

  await row('channel archive of topic clicks').locator('summary').click();
  await until('a row opens to its clients', async () => (await row('channel archive of topic clicks').locator('.clients').innerText()).includes('No client'));
  const consumer = net.connect((await (await fetch(api + '/info')).json()).tcp_port, '127.0.0.1');
  const hello = Buffer.from(JSON.stringify({ client_id: '<img src=x onerror=alert(1)>', user_agent: '<i>agent</i>' }));
  const size = Buffer.alloc(4);
  size.writeUInt32BE(hello.length);
  consumer.on('error', () => {});
  consumer.write(Buffer.concat([Buffer.from('  V2IDENTIFY\n'), size, hello, Buffer.from('SUB clicks archive\nRDY 2\n')]));
  await until('a client is shown as text, not as HTML', async () => (await row('channel archive of topic clicks').locator('.clients').innerText()).includes(
    '<img src=x onerror=alert(1)>') && await page.locator('.clients *').count() === 0);
  await until('messages in flight show', async () => await cell('channel archive of topic clicks', 'in_flight_count') === '2');

  if (shots) await screenshots(browser, base, post);

  await page.getByRole('button', { name: 'Empty channel archive of topic clicks', exact: true }).click();
  await page.locator('dialog[open]').getByRole('button', { name: 'Empty', exact: true }).click();
  await until('emptied after a confirmation', () => toast('Empty channel archive of topic clicks: done'));
  consumer.destroy();

  const trash = page.getByRole('button', { name: 'Delete channel archive of topic clicks', exact: true });
  await trash.click();
  check('the confirmation names what goes', (await page.locator('dialog[open]').innerText()).includes('channel archive of topic clicks'));
  await page.keyboard.press('Escape');
  check('Escape leaves it', (await topic('clicks')).channels.length === 1);
  await trash.focus();
  await page.keyboard.press('Enter');
  await page.keyboard.press('Enter');
  check('Enter means Cancel at first', (await topic('clicks')).channels.length === 1);
  await page.keyboard.press('Enter');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter');
  await until('deleted by keyboard, with a confirmation', async () => (await topic('clicks')).channels.length === 0);
  await until('and the row is gone', async () => await row('channel archive of topic clicks').count() === 0);
  await page.getByRole('button', { name: 'Delete topic orders#ephemeral', exact: true }).click();
  await page.locator('dialog[open]').getByRole('button', { name: 'Delete', exact: true }).click();
  await until('a name with # is deleted too', async () => !(await topic('orders#ephemeral')));

  await post('pub?topic=stays', 'kept on disk');
  away = true;
  await stop(child);
  await until('the page says that the daemon is gone', () => page.locator('#problem').isVisible());
  if (shots) await page.screenshot({ path: path.join(shots, 'gone.png') });
  ({ child } = await daemon(port));
  await until('it comes back by itself', () => page.locator('#problem').isHidden());
  away = false;
  await until('with what was kept', async () => await cell('topic stays', 'depth') === '1');
  await post('pub?topic=stays', 'more');
  await until('and is live again', async () => await cell('topic stays', 'depth') === '2');

  for (let t = 0; t < 200; t++) {
    const name = `load-${String(t).padStart(3, '0')}`;
    await post(`topic/create?topic=${name}`);
    for (const channel of ['archive', 'mail', 'metrics']) await post(`channel/create?topic=${name}&channel=${channel}`);
    await post(`pub?topic=${name}`, 'x');
  }
  await until('200 topics with 3 channels each are listed', async () => await page.locator('tr').count() >= 800);
  const first = await page.locator('tr').nth(40).elementHandle();
  const times = await page.evaluate(async () => {
    const times = [];
    for (let i = 0; i < 20; i++) {
      const stats = await (await fetch('stats?format=json&include_mem=false')).json();
      for (const t of stats.topics) { t.depth += i; for (const c of t.channels) { c.depth += i * 7; c.message_count += i * 9; } }
      const begin = performance.now();
      render(stats, Date.now() + i);
      document.body.getBoundingClientRect();
      times.push(performance.now() - begin);
    }
    return times.sort((a, b) => a - b);
  });
  console.log(`     update and layout of 800 rows: median ${times[10].toFixed(1)} ms, worst ${times[19].toFixed(1)} ms`);
  check('an update takes less than 50 ms', times[10] < 50, times);
  check('rows are updated in place', await first.evaluate(e => e.isConnected));
  await page.getByLabel('Filter by name').fill('load-123/ma');
  await until('the filter finds one of them', async () => await page.locator('tr[id*="/"]:visible').count() === 2);
  if (shots) { await page.getByLabel('Filter by name').fill('load'); await page.screenshot({ path: path.join(shots, 'many.png') }); }
  await page.setViewportSize({ width: 400, height: 800 });
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  check('no sideways scrolling at 400 px', width <= 400, width);

  check('no error on the console', errors.length === 0, errors);
  await browser.close();
  await stop(child);
}

async function screenshots(browser, base, post) {
  fs.mkdirSync(shots, { recursive: true });
  for (const colorScheme of ['light', 'dark']) for (const width of [1280, 400]) {
    const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
    await page.goto(base);
    for (let i = 0; i < 8; i++) { await post('mpub?topic=clicks', 'x\n'.repeat(i % 3 * 40 + 5)); await sleep(600); }
    await page.locator('summary').first().click();
    await sleep(1500);
    await page.screenshot({ path: path.join(shots, `page-${width}-${colorScheme}.png`) });
    await page.getByRole('button', { name: 'Delete topic clicks', exact: true }).click();
    await page.screenshot({ path: path.join(shots, `confirm-${width}-${colorScheme}.png`) });
    await page.keyboard.press('Escape');
    await page.getByRole('button', { name: 'Publish to topic clicks', exact: true }).click();
    await page.screenshot({ path: path.join(shots, `publish-${width}-${colorScheme}.png`) });
    await page.close();
  }
}

main().catch(e => check('the test runs to its end', false, e.message)).finally(async () => {
  for (const child of children) child.kill('SIGTERM');
  await Promise.all([...children].map(child => child.gone));
  fs.rmSync(data, { recursive: true, force: true });
  console.log(`${passed} passed, ${failed} failed`);
  process.exit(failed ? 1 : 0);
});
