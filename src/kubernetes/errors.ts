/**
What can go wrong with the API server. `kind` is what counters and loops sort by.
*/
import {AgentError, reasonOf} from '../errors.js';

export type FailureKind = 'connection' | 'timeout' | 'protocol' | 'refused' | 'server' | 'gone' | 'closed_early';

export abstract class KubernetesError extends AgentError {
	abstract readonly kind: FailureKind;

	/** The server itself is in trouble, or cannot be reached: everybody who asks it should slow down. */
	get isServerFailure(): boolean {
		return this.kind !== 'refused' && this.kind !== 'gone';
	}
}

/** An answer other than 2xx, or an ERROR event within a watch. `reason` and `detail` are those of its Status object. */
export class KubernetesStatusError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_STATUS';
	readonly kind: FailureKind;

	/**
	@param what - as {@link describeRequest} words it.
	@param detail - the Status object's message, or the start of a body that is none.
	@param retryAfterMs - what the server asks for.
	*/
	constructor(readonly what: string, readonly status: number, readonly reason: string, readonly detail: string, readonly retryAfterMs?: number) {
		const words = [reason, detail].filter(Boolean).join(': ');
		super(`the API server did not ${what} (${status}${words ? ` ${words}` : ''})${remedyFor(status, what)}`);
		this.kind = status === 410 ? 'gone' : status === 401 || status === 429 || status >= 500 ? 'server' : 'refused';
	}
}

/** No connection, or it broke. `isUntrusted`: the server's certificate was not accepted. */
export class KubernetesConnectionError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_CONNECTION';
	readonly kind = 'connection';
	readonly isUntrusted: boolean;
	declare readonly cause: Error;

	constructor(readonly server: string, cause: Error, remedy: {readonly caFile?: string | undefined}) {
		const {code = ''} = cause as NodeJS.ErrnoException;
		const isUntrusted = UNTRUSTED.test(code);
		const advice = isUntrusted
			? `give the authority that signed its certificate${remedy.caFile === undefined ? ' by --ca-file' : `: ${remedy.caFile} does not hold it`}`
			: 'if it stays so, look at the address (--api-server) and at network policies';
		super(`the connection to the API server ${server} failed (${code && !cause.message.includes(code) ? `${code}: ` : ''}${reasonOf(cause)}): ${advice}`, {cause});
		this.isUntrusted = isUntrusted;
	}
}

/** OpenSSL's and Node's names for a certificate that is not accepted. */
const UNTRUSTED = /^(?:ERR_TLS_CERT_|DEPTH_ZERO_|SELF_SIGNED_|UNABLE_TO_|CERT_|INVALID_CA|INVALID_PURPOSE|PATH_LENGTH_|HOSTNAME_MISMATCH)/;

export class KubernetesTimeoutError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_TIMEOUT';
	readonly kind = 'timeout';

	constructor(readonly what: string, readonly timeoutMs: number) {
		super(`the API server did not ${what} (nothing whole came in ${timeoutMs} ms): trying again over a new connection`);
	}
}

/** The server said something that is not the Kubernetes API. */
export class KubernetesProtocolError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_PROTOCOL';
	readonly kind = 'protocol';

	constructor(readonly what: string, readonly problem: string, options?: ErrorOptions) {
		super(`the API server did not ${what} (${problem}): if it stays so, see whether something between rewrites its answers`, options);
	}
}

/** A watch that the server ended without a reason long before its time. */
export class KubernetesClosedEarlyError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_CLOSED_EARLY';
	readonly kind = 'closed_early';

	constructor(readonly what: string, readonly openMs: number) {
		super(`the API server ended after ${Math.round(openMs)} ms the answer to: ${what}; trying again more and more slowly`);
	}
}

/** Token or authority cannot be read, and there is no earlier one to go on with. */
export class KubernetesCredentialsError extends KubernetesError {
	readonly code = 'ERR_KUBERNETES_CREDENTIALS';
	readonly kind = 'connection';

	constructor(readonly file: string, problem: string, options?: ErrorOptions) {
		super(`credentials for the API server: ${file} cannot be used (${problem}): mount the service account's token, or give --token-file and --ca-file`, options);
	}
}

/**
A request in words that follow "did not": `list pods`, `patch pods/status shop/web`.

@param target - path with query.
*/
export function describeRequest(method: string, target: string): string {
	const {verb, resource, object} = parseRequest(method, target);
	return [verb, resource, object].filter(Boolean).join(' ');
}

/** As RBAC sees it. */
function parseRequest(method: string, target: string): {readonly verb: string; readonly resource: string; readonly object: string} {
	const {pathname, searchParams} = new URL(target, 'http://server');
	const parts = pathname.split('/').filter(Boolean);
	// /api/VERSION/… is the core group, /apis/GROUP/VERSION/… any other.
	const rest = parts[0] === 'apis' ? parts.slice(3) : parts.slice(2);
	const namespace = rest[0] === 'namespaces' && rest.length > 2 ? rest[1] : undefined;
	const [kind = pathname, name, subresource] = namespace === undefined ? rest : rest.slice(2);
	const verbs: Record<string, string> = {GET: searchParams.has('watch') ? 'watch' : name === undefined ? 'list' : 'get', POST: 'create', PATCH: 'patch', PUT: 'update', DELETE: 'delete'};
	return {
		verb: verbs[method] ?? method.toLowerCase(),
		resource: subresource === undefined ? kind : `${kind}/${subresource}`,
		object: [namespace, name].filter(part => part !== undefined).join('/'),
	};
}

function remedyFor(status: number, what: string): string {
	const [verb = '', resource = ''] = what.split(' ');
	switch (status) {
		case 401: return ': it does not accept the token; see that the service account exists and its token is mounted (--token-file)';
		case 403: return `: allow the verb \`${verb}\` on \`${resource}\` in the ClusterRole of the agent's service account`;
		case 429: return ': it is overloaded; trying again more slowly';
		default: return status >= 500 ? ': trying again more slowly; if it stays so, look at the API server\'s own log' : '';
	}
}
