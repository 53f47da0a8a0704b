import {once} from 'node:events';
import {connect} from 'node:net';
import {text} from 'node:stream/consumers';
import test from 'ava';
import {serveMetrics} from '../../src/metrics/server.js';

test('whatever is asked for is answered, and the next one too', async t => {
	const {server, port} = await serveMetrics({host: '127.0.0.1', port: 0}, async () => 'metrics\n', () => ({alive: true, ready: true, problems: []}));
	t.teardown(() => {
		server.close();
	});
	const ask = async (target: string) => {
		const socket = connect(port, '127.0.0.1', () => {
			socket.write(`GET ${target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n`);
		});
		await once(socket, 'connect');
		return /^HTTP\/1\.1 (\d+)/.exec(await text(socket))?.[1];
	};

	for (const [target, status] of [['//', '404'], ['http://[', '404'], ['/%', '404'], ['*', '404'], ['/healthz?x=//', '200'], ['/metrics', '200']] as const) {
		t.is(await ask(target), status, target);
	}
});
