import {Buffer} from 'node:buffer';
import {writeFileSync} from 'node:fs';
import {createServer, type Server} from 'node:http';
import {connect, createServer as createTcpServer, type AddressInfo} from 'node:net';
import path from 'node:path';
import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {InputError} from '../../src/errors.js';
import {KubernetesClient, inClusterOptions, type WatchEvent} from '../../src/kubernetes/client.js';
import {
	KubernetesConnectionError, KubernetesCredentialsError, KubernetesProtocolError, KubernetesStatusError, KubernetesTimeoutError, describeRequest,
} from '../../src/kubernetes/errors.js';
import {LineSplitter} from '../../src/kubernetes/lines.js';
import {eventually} from '../helpers/process.js';
import {makeCertificate} from './certificate.js';
import {makePod} from './fake-server.js';
import {FAST, makeBench} from './helpers.js';

const PODS = '/api/v1/pods';

test('an object is read over TLS with the token', async t => {
	const {server, client} = await makeBench(t);
	server.put('pods', makePod('shop/web', {uid: 'u1'}));
	const pod = await client.get('/api/v1/namespaces/shop/pods/web') as {metadata: {uid: string}};
	t.is(pod.metadata.uid, 'u1');
	t.regex(server.url, /^https:/);
});

test('connections are kept and used again', async t => {
	const {server, client} = await makeBench(t);
	for (let index = 0; index < 10; index++) {
		await client.get(PODS);
	}

	t.is(server.connections, 1);
});

test('a refusal tells status, reason, message, and what RBAC lacks', async t => {
	const {server, client} = await makeBench(t);
	const missing = await t.throwsAsync(client.get('/api/v1/namespaces/shop/pods/web'), {instanceOf: KubernetesStatusError});
	t.deepEqual([missing.status, missing.reason, missing.detail, missing.kind], [404, 'NotFound', 'pods "web" not found', 'refused']);
	server.behave({status: 403});
	await t.throwsAsync(client.patch('/api/v1/namespaces/shop/pods/web/status', {}), {
		instanceOf: KubernetesStatusError, code: 'ERR_KUBERNETES_STATUS',
		message: 'the API server did not patch pods/status shop/web (403 InternalError: the server is hostile): allow the verb `patch` on `pods/status` in the ClusterRole of the agent\'s service account',
	});
});

test('requests are named as RBAC names them', t => {
	t.is(describeRequest('GET', '/api/v1/pods?limit=1'), 'list pods');
	t.is(describeRequest('GET', '/api/v1/pods?watch=1'), 'watch pods');
	t.is(describeRequest('GET', '/api/v1/namespaces'), 'list namespaces');
	t.is(describeRequest('GET', '/api/v1/namespaces/shop'), 'get namespaces shop');
	t.is(describeRequest('GET', '/api/v1/namespaces/shop/pods'), 'list pods shop');
	t.is(describeRequest('GET', '/api/v1/namespaces/shop/pods/web'), 'get pods shop/web');
	t.is(describeRequest('POST', '/apis/events.k8s.io/v1/namespaces/shop/events'), 'create events shop');
	t.is(describeRequest('PATCH', '/api/v1/namespaces/shop/pods/web/status'), 'patch pods/status shop/web');
	t.is(describeRequest('GET', '/healthz'), 'list /healthz');
});

test('a token that was replaced is read at once after a 401', async t => {
	const {server, client, directory} = await makeBench(t, {timing: {...FAST, credentialsMs: 3_600_000}});
	await client.get(PODS);
	server.tokens.clear();
	server.tokens.add('newer');
	writeFileSync(path.join(directory, 'token'), 'newer\n');
	await client.get(PODS);
	t.deepEqual(server.history.map(({status}) => status), [200, 401, 200]);
});

test('a token is read again once a minute, before it is refused', async t => {
	const {server, client, directory} = await makeBench(t);
	await client.get(PODS);
	writeFileSync(path.join(directory, 'token'), 'newer');
	server.tokens.clear();
	server.tokens.add('newer');
	await sleep(FAST.credentialsMs + 100);
	await client.get(PODS);
	t.deepEqual(server.history.map(({status}) => status), [200, 200]);
});

test('a 401 with the same token is an error, without a second attempt', async t => {
	const {server, client, directory} = await makeBench(t);
	server.tokens.clear();
	server.tokens.add('another');
	await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesStatusError, message: /401.*does not accept the token/});
	t.is(server.history.length, 1);
	// It could be half written: what was there before is better than nothing.
	writeFileSync(path.join(directory, 'token'), '');
	await t.throwsAsync(client.get(PODS), {message: /401/});
	server.tokens.add('good');
	await client.get(PODS);
});

test('an authority that was replaced is read at once when the certificate is not trusted', async t => {
	const {server, client, directory} = await makeBench(t);
	await client.get(PODS);
	server.rotateCertificate();
	const untrusted = await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesConnectionError});
	t.true(untrusted.isUntrusted);
	t.regex(untrusted.message, /: give the authority that signed its certificate: .*ca\.crt does not hold it$/);
	writeFileSync(path.join(directory, 'ca.crt'), server.ca!);
	await client.get(PODS);
});

test('a certificate of somebody else, and one for another name, are refused', async t => {
	const {server, directory} = await makeBench(t, {server: {host: '0.0.0.0'}});
	const caFile = path.join(directory, 'other.crt');
	writeFileSync(caFile, makeCertificate().cert);
	const log = () => {};
	const url = (host: string) => server.url.replace('0.0.0.0', host);
	const client = new KubernetesClient({server: url('127.0.0.1'), caFile, log});
	t.true((await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesConnectionError})).isUntrusted);
	const noCa = new KubernetesClient({server: url('127.0.0.1'), log});
	await t.throwsAsync(noCa.get(PODS), {message: /by --ca-file$/});
	t.is(server.history.length, 0);
	writeFileSync(caFile, server.ca!);
	const named = new KubernetesClient({server: url('localhost'), caFile, log});
	t.is((await t.throwsAsync(named.get(PODS), {instanceOf: KubernetesStatusError})).status, 401);
	const other = new KubernetesClient({server: url('127.0.0.2'), caFile, log});
	t.true((await t.throwsAsync(other.get(PODS), {instanceOf: KubernetesConnectionError})).isUntrusted);
});

test('a file of credentials that is not there is named', async t => {
	const {server, directory} = await makeBench(t);
	const client = new KubernetesClient({server: server.url, tokenFile: path.join(directory, 'none'), log() {}});
	await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesCredentialsError, message: /none cannot be used \(ENOENT.*--token-file/});
});

test('a server that cannot be reached is named with the kernel\'s word', async t => {
	const {server, client} = await makeBench(t);
	await server.stop();
	await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesConnectionError, message: /^the connection to the API server https:\/\/127\.0\.0\.1:\d+ failed \(.*ECONNREFUSED/});
	await server.listen();
});

test('an idle connection that the server has ended is replaced without an error', async t => {
	const {server, client} = await makeBench(t);
	await client.get(PODS);
	let attempts = 0;
	server.behave({
		reset: true,
		applies() {
			attempts++;
			return attempts === 1;
		},
	});
	await client.get(PODS);
	t.is(server.connections, 2);
	// Not for what could be done twice by it.
	attempts = 0;
	await t.throwsAsync(client.post('/apis/events.k8s.io/v1/namespaces/a/events', {metadata: {name: 'x'}}), {instanceOf: KubernetesConnectionError});
});

test('no answer in time is an error that ends the connection', async t => {
	const {server, client} = await makeBench(t);
	server.behave({silent: true});
	const started = performance.now();
	await t.throwsAsync(client.get(PODS, {timeoutMs: 100}), {instanceOf: KubernetesTimeoutError, message: /did not list pods \(nothing whole came in 100 ms\)/});
	t.true(performance.now() - started < FAST.requestMs);
	await eventually('the connection is gone', () => server.openConnections === 0);
});

test('an aborted request ends with the signal\'s reason, and leaves nothing behind', async t => {
	const {server, client} = await makeBench(t);
	server.behave({silent: true});
	const controller = new AbortController();
	const request = client.get(PODS, {signal: controller.signal});
	await eventually('the request is there', () => server.history.length === 1);
	const reason = new Error('enough');
	controller.abort(reason);
	t.is(await t.throwsAsync(request), reason);
	await eventually('the connection is gone', () => server.openConnections === 0);
	t.is(await t.throwsAsync(client.get(PODS, {signal: controller.signal})), reason);
	t.is(server.history.length, 1);
});

test('an address that is none is refused', t => {
	for (const server of ['', 'x', 'ftp://x', '10.0.0.1:6443', 'https://user@host', 'https://host?x=1']) {
		t.throws(() => new KubernetesClient({server, log() {}}), {instanceOf: InputError, message: /^--api-server: expected an address/}, server);
	}
});

test('in a cluster, address and credentials are where Kubernetes puts them', t => {
	t.deepEqual(inClusterOptions({KUBERNETES_SERVICE_HOST: '10.96.0.1', KUBERNETES_SERVICE_PORT: '6443'}, '/sa'), {server: 'https://10.96.0.1:6443', tokenFile: '/sa/token', caFile: '/sa/ca.crt'});
	t.is(inClusterOptions({KUBERNETES_SERVICE_HOST: 'fd00::1'}, '/sa').server, 'https://[fd00::1]:443');
	t.throws(() => inClusterOptions({}), {instanceOf: InputError, message: /this is not a pod/});
});

/** A server that answers every request with these bytes, piece by piece. */
async function rawServer(t: ExecutionContext, ...pieces: ReadonlyArray<Buffer | string>): Promise<KubernetesClient> {
	const server: Server = createServer(async (_request, response) => {
		response.writeHead(200);
		for (const piece of pieces) {
			response.write(piece);
			await sleep(2);
		}

		response.end();
	});
	await new Promise<void>(resolve => {
		server.listen(0, '127.0.0.1', resolve);
	});
	const client = new KubernetesClient({server: `http://127.0.0.1:${(server.address() as AddressInfo).port}/prefix/`, timing: FAST, log() {}});
	t.teardown(() => {
		client.close();
		server.closeAllConnections();
		server.close();
	});
	return client;
}

async function watchAll(client: KubernetesClient): Promise<WatchEvent[]> {
	const events: WatchEvent[] = [];
	await client.watch(`${PODS}?watch=1`, event => {
		events.push(event);
	}, {signal: new AbortController().signal, inactivityMs: 20_000});
	return events;
}

test('events are whole however their bytes are cut', async t => {
	const event = {type: 'ADDED', object: {text: 'grüße 🦀 日本'}};
	const bytes = Buffer.from(`${JSON.stringify(event)}\n\n${JSON.stringify(event)}\r\n`);
	t.deepEqual(await watchAll(await rawServer(t, ...Array.from(bytes, byte => Buffer.from([byte])))), [event, event]);
});

test('what is not an event ends the watch with an error', async t => {
	for (const text of ['{"type":', 'hello', '[]', 'null', '{"object":{}}', '{"type":1}']) {
		await t.throwsAsync(watchAll(await rawServer(t, `${text}\n`)), {instanceOf: KubernetesProtocolError, message: /did not watch pods \(not an event/}, text);
	}

	await t.throwsAsync(watchAll(await rawServer(t, Buffer.from([0x7b, 0xff, 0x7d, 0x0a]))), {message: /not UTF-8/});
	await t.throwsAsync(watchAll(await rawServer(t, '{"type":"ADDED"')), {message: /ends within an event, after 15 bytes/});
	await t.throwsAsync(watchAll(await rawServer(t, 'x'.repeat(9 << 20))), {message: /a line is longer than 8388608 bytes/});
});

test('an answer that is not JSON, or too long, is an error', async t => {
	await t.throwsAsync((await rawServer(t, '<html>login</html>')).get(PODS), {instanceOf: KubernetesProtocolError, message: /its answer is not JSON: <html>login<\/html>/});
	const large = Array.from({length: 33}, () => 'x'.repeat(1 << 20));
	await t.throwsAsync((await rawServer(t, ...large)).get(PODS, {timeoutMs: 20_000}), {message: /longer than 33554432 bytes/});
});

test('what onEvent throws ends the watch', async t => {
	const client = await rawServer(t, '{"type":"ADDED"}\n', '{"type":"ADDED"}\n');
	const problem = new Error('not this one');
	t.is(await t.throwsAsync(client.watch(`${PODS}?watch=1`, () => {
		throw problem;
	}, {signal: new AbortController().signal, inactivityMs: 20_000})), problem);
});

test('a server that takes connections and never says a word, TLS neither, is given up', async t => {
	const sockets = new Set<{destroy(): unknown}>();
	const server = createTcpServer(socket => {
		sockets.add(socket);
		socket.on('error', () => {});
	});
	await new Promise<void>(resolve => {
		server.listen(0, '127.0.0.1', resolve);
	});
	t.teardown(() => {
		server.close();
		for (const socket of sockets) {
			socket.destroy();
		}
	});
	const client = new KubernetesClient({server: `https://127.0.0.1:${(server.address() as AddressInfo).port}`, timing: {...FAST, requestMs: 100}, log() {}});
	await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesTimeoutError});
	// Nor does garbage in the place of TLS or HTTP throw anything else.
	const port = await new Promise<number>(resolve => {
		const liar = createTcpServer(socket => {
			socket.on('error', () => {});
			socket.end('SSH-2.0-OpenSSH_9.2\r\n');
		}).listen(0, '127.0.0.1', () => {
			resolve((liar.address() as AddressInfo).port);
		});
		t.teardown(() => {
			liar.close();
		});
	});
	connect(port, '127.0.0.1').destroy();
	for (const scheme of ['http', 'https']) {
		await t.throwsAsync(new KubernetesClient({server: `${scheme}://127.0.0.1:${port}`, timing: FAST, log() {}}).get(PODS), {instanceOf: KubernetesConnectionError}, scheme);
	}
});

test('while the server does well, requests do not wait', async t => {
	const {server, client} = await makeBench(t, {timing: {...FAST, gapMs: 20_000}});
	await client.get(PODS);
	const started = performance.now();
	await Promise.all(Array.from({length: 20}, async () => client.get(PODS)));
	t.true(performance.now() - started < 15_000);
	t.is(server.history.length, 21);
});

test('while it fails, all requests together start one a gap; when it answers again, the rest starts at once', async t => {
	const gapMs = 100;
	const {server, client} = await makeBench(t, {timing: {...FAST, gapMs}});
	await client.get(PODS);
	server.behave({status: 500});
	await t.throwsAsync(client.get(PODS));
	const started = performance.now();
	const results = Promise.allSettled(Array.from({length: 200}, async () => client.get(PODS)));
	await sleep(10 * gapMs);
	const most = (performance.now() - started) / gapMs + 1;
	t.true(server.history.length - 2 <= most, `${server.history.length - 2} requests, at most ${most}`);
	server.behave();
	await eventually('nobody waits', () => client.pace.waiting === 0);
	t.true(performance.now() - started < 100 * gapMs);
	await results;
	t.is(server.history.length, 202);
});

test('a new server gets one request at a time until it has answered', async t => {
	const {server, client} = await makeBench(t, {timing: {...FAST, gapMs: 100}});
	server.behave({silent: true});
	const controller = new AbortController();
	const results = Promise.allSettled(Array.from({length: 20}, async () => client.get(PODS, {signal: controller.signal})));
	const started = performance.now();
	await sleep(450);
	const most = (performance.now() - started) / 100 + 2;
	t.true(server.history.length <= most, `${server.history.length} requests, at most ${most}`);
	controller.abort();
	await results;
	t.is(client.pace.waiting, 0);
});

test('Retry-After is kept, up to a bound', async t => {
	const {server, client} = await makeBench(t, {timing: {...FAST, gapMs: 10, maxBackoffMs: 1500}});
	server.behave({status: 429, retryAfter: '1'});
	const refusal = await t.throwsAsync(client.get(PODS), {instanceOf: KubernetesStatusError});
	t.is(refusal.retryAfterMs, 1000);
	server.behave({status: 503, retryAfter: '86400'});
	await t.throwsAsync(client.get(PODS));
	server.behave();
	await client.get(PODS);
	const [first, second, third] = server.history.map(({atMs}) => atMs);
	t.true(second! - first! >= 990, `${second! - first!}`);
	t.true(third! - second! >= 1490 && third! - second! < 60_000, `${third! - second!}`);
});

test('lines are split at any byte and have a bound', t => {
	const text = 'añb\n\n日本\r\nc🦀d\nrest';
	const bytes = Buffer.from(text);
	for (let cut = 0; cut <= bytes.length; cut++) {
		const splitter = new LineSplitter(100);
		t.deepEqual([...splitter.push(bytes.subarray(0, cut)), ...splitter.push(bytes.subarray(cut))], ['añb', '日本', 'c🦀d']);
		t.is(splitter.pendingBytes, 4);
	}

	t.deepEqual([...new LineSplitter(3).push(Buffer.from('abc\n'))], ['abc']);
	t.throws(() => [...new LineSplitter(3).push(Buffer.from('abcd\n'))], {instanceOf: RangeError});
	t.throws(() => [...new LineSplitter(3).push(Buffer.from('abcd'))], {instanceOf: RangeError});
});
