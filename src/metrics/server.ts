import {createServer, type Server} from 'node:http';
import type {AddressInfo} from 'node:net';
import {InputError, reasonOf} from '../errors.js';

export interface Health {
	/** The control loop turns. */
	readonly alive: boolean;
	/** Every pod of the pods file is enrolled, and the file itself is good. */
	readonly ready: boolean;
	/** Why not, a line each. */
	readonly problems: readonly string[];
}

/** `127.0.0.1:9478`, `[::1]:0`, `:9478`. */
export function parseListenAddress(text: string, option: string): {readonly host: string | undefined; readonly port: number} {
	const match = /^(?:\[([\da-f:.]+)]|([\w.-]*)):(\d{1,5})$/i.exec(text);
	const port = Number(match?.[3]);
	if (!match || port > 65_535) {
		throw new InputError(option, `expected address:port such as 127.0.0.1:9478, got '${text}'`);
	}

	return {host: match[1] ?? (match[2] || undefined), port};
}

/** Serves /metrics, /healthz (alive?) and /readyz (as it should be?). */
export async function serveMetrics(listen: {readonly host: string | undefined; readonly port: number}, metrics: () => Promise<string>, health: () => Health): Promise<{readonly server: Server; readonly port: number}> {
	const server = createServer(async (request, response) => {
		const answer = (status: number, body: string, type = 'text/plain; charset=utf-8') => {
			response.writeHead(status, {'content-type': type}).end(request.method === 'HEAD' ? undefined : body);
		};

		if (request.method !== 'GET' && request.method !== 'HEAD') {
			answer(405, 'GET only\n');
			return;
		}

		const {alive, ready, problems} = health();
		const because = problems.map(problem => `${problem}\n`).join('');
		switch ((request.url ?? '/').split('?', 1)[0]) {
			case '/metrics': {
				try {
					answer(200, await metrics(), 'text/plain; version=0.0.4; charset=utf-8');
				} catch (error) {
					answer(500, `${reasonOf(error)}\n`);
				}

				break;
			}

			case '/healthz': {
				answer(alive ? 200 : 503, alive ? 'ok\n' : because);
				break;
			}

			case '/readyz': {
				answer(ready ? 200 : 503, ready ? 'ok\n' : because);
				break;
			}

			default: {
				answer(404, 'try /metrics, /healthz or /readyz\n');
			}
		}
	});
	await new Promise<void>((resolve, reject) => {
		server.once('error', reject);
		server.listen(listen.port, listen.host, resolve);
	});
	return {server, port: (server.address() as AddressInfo).port};
}
